"""Terms that keep features from losing dimensions.

A falling loss with a healthy standard deviation can hide that the features use
ever fewer directions. These terms look at a matrix of features `[N, D]`, whose
rows are clips or tokens, and are small only if all D directions vary. Each is a
float32 scalar.
"""

import jax
import jax.numpy as jnp

_FREQUENCIES = 17
_LARGEST_FREQUENCY = 3.0


def compute_variance_term(features: jax.Array) -> jax.Array:
  """Computes the hinge on standard deviations (VICReg, equation 1).

  `mean_d max(0, 1 - sqrt(Var_n z_nd + 1e-4))`, Bardes et al. 2022; between 0
  and 1.
  """
  variance = jnp.var(features.astype(jnp.float32), axis=0)
  return jnp.mean(jax.nn.relu(1.0 - jnp.sqrt(variance + 1e-4)))


def compute_covariance_term(features: jax.Array) -> jax.Array:
  """Computes the sum of squared covariances (VICReg, equations 3 and 4).

  `1 / D sum_{i != j} C_ij^2` with the unbiased covariance C of at least 2 rows.
  """
  x = features.astype(jnp.float32)
  x = x - x.mean(axis=0)
  covariance = x.T @ x / (x.shape[0] - 1)  # [D, D]
  off_diagonal = jnp.sum(covariance**2) - jnp.sum(jnp.diag(covariance) ** 2)
  return off_diagonal / x.shape[1]


def compute_sigreg(
  features: jax.Array, key: jax.Array, num_directions: int = 256
) -> jax.Array:
  """Computes how far features are from N(0, I) (LeJEPA, SIGReg).

  The mean over random unit directions a of the Epps-Pulley statistic
  `N int |1/N sum_n exp(i t a.z_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt`, by the
  trapezoid rule over [-3, 3]; Balestriero and LeCun 2025, arXiv 2511.08544.

  Args:
    features: `[N, D]`.
    key: Draws the directions; the same on every host.
    num_directions: How many.
  """
  x = features.astype(jnp.float32)
  directions = jax.random.normal(key, (x.shape[1], num_directions))
  directions /= jnp.linalg.norm(directions, axis=0)
  projected = x @ directions  # [N, directions]

  # A frequency at a time, and anew in the backward pass: all together they
  # would be the largest array of the step.
  @jax.checkpoint
  def measure(t):
    gaussian = jnp.exp(-0.5 * t**2)
    distance = (jnp.cos(t * projected).mean(axis=0) - gaussian) ** 2
    distance += jnp.sin(t * projected).mean(axis=0) ** 2
    return distance * gaussian  # [directions]

  # The integrand is even: twice the positive half.
  t = jnp.linspace(0.0, _LARGEST_FREQUENCY, _FREQUENCIES)
  statistic = 2.0 * jnp.trapezoid(jax.lax.map(measure, t), t, axis=0)
  return x.shape[0] * statistic.mean()
