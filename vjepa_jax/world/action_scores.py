"""What a model with actions is worth before anyone acts on it.

Errors of what it imagines, beside a world that stands still; and the energy of
all actions of a step, among which the true one should have the least.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.training.objectives.targets import measure_error
from vjepa_jax.world import planning
from vjepa_jax.world.imagination import ActionModel, imagine


def measure_rollouts(
  model: ActionModel,
  frames: np.ndarray,
  states: np.ndarray,
  actions: np.ndarray,
  window: int | None = None,
) -> dict[str, list[float]]:
  """Measures how far off what is imagined of true actions is.

  Args:
    model: The model.
    frames: uint8 `[n, T, h, w, 3]`.
    states: `[n, T, S]`.
    actions: `[n, T, A]`, of which the last is not used.
    window: See `imagine`.

  Returns:
    Mean absolute differences of features after 1, ..., T - 1 steps:
    'imagined', and 'copied' for a world that stands still.
  """

  @jax.jit
  def measure(params, frames, states, actions):
    features = jax.lax.map(lambda x: model.encode(params, x), frames)
    found = jax.vmap(
      lambda frame, state, plan: imagine(
        model, params, frame, state, plan[None], window
      )[0]
    )(features[:, 0], states[:, 0], actions[:, :-1])
    truth = features[:, 1:].reshape(found.shape)
    start = features[:, :1].reshape(len(found), 1, *found.shape[2:])
    return [
      measure_error(x, truth, 1).mean(axis=(0, 2, 3)) for x in (found, start)
    ]

  found = measure(model.params, frames, states, actions)
  names = 'imagined', 'copied'
  return {k: x.tolist() for k, x in zip(names, found, strict=True)}


def measure_landscape(
  model: ActionModel,
  frames: np.ndarray,
  states: np.ndarray,
  actions: np.ndarray,
  reach: float,
  *,
  axes: tuple[int, int] = (0, 1),
  points: int = 21,
  loss_exp: float = 1,
) -> dict[str, np.ndarray]:
  """Measures the energy of a slice of actions, with the next frame as goal.

  It is a slice and not a sum: along the other axes actions are 0.

  Args:
    model: The model.
    frames: Before and after, uint8 `[n, 2, h, w, 3]`.
    states: Before, `[n, S]`.
    actions: That were taken, `[n, A]`.
    reach: The grid goes from `-reach` to `reach`.
    axes: Of the slice.
    points: Of the grid along an axis.
    loss_exp: Of the energy.

  Returns:
    'grid' `[points]`; 'energy' `[n, points, points]`, the first axis first;
    'zero', 'truth' and 'least', energies `[n]`; 'rank' `[n]`, the share of the
    grid with less energy than the truth; 'found' `[n, 2]`, the least's action.
  """
  options = planning.Search(loss_exp=loss_exp)
  grid = jnp.linspace(-reach, reach, points)
  x, y = (g.ravel() for g in jnp.meshgrid(grid, grid, indexing='ij'))
  plans = jnp.zeros((points * points, 1, actions.shape[-1]))
  plans = plans.at[:, 0, axes[0]].set(x).at[:, 0, axes[1]].set(y)

  @jax.jit
  def measure(params, frames, states, actions):
    features = jax.lax.map(lambda x: model.encode(params, x), frames)

    def compare(case):
      (before, after), state, action = case
      energy = planning.make_energy(options, after.reshape(-1, after.shape[-1]))
      tried = jnp.concatenate(
        [plans, action[None, None], jnp.zeros_like(plans[:1])]
      )
      return energy(imagine(model, params, before, state, tried))

    return jax.lax.map(compare, (features, states, actions))

  found = np.asarray(measure(model.params, frames, states, actions))
  energy, truth, zero = found[:, :-2], found[:, -2], found[:, -1]
  best = energy.argmin(axis=1)
  return {
    'grid': np.asarray(grid),
    'energy': energy.reshape(-1, points, points),
    'zero': zero,
    'truth': truth,
    'least': energy.min(axis=1),
    'rank': (energy < truth[:, None]).mean(axis=1),
    'found': np.stack([x[best], y[best]], axis=1),
  }


def calibrate(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Finds the rotation that turns inferred actions into true ones.

  A camera that stands elsewhere than in training turns what is inferred: some
  random moves tell by how much (V-JEPA 2-AC, appendix B.4).

  Args:
    found: Inferred of random moves, `[n, D]`.
    truth: What they were, `[n, D]`.

  Returns:
    `[D, D]`; a plan is turned by `plan @ rotation`.
  """
  u, _, v = np.linalg.svd(found.T @ truth)
  sign = np.ones(len(u))
  sign[-1] = np.sign(np.linalg.det(u @ v))  # a rotation and no reflection
  return (u * sign) @ v


def fit_decoder(
  features: np.ndarray, frames: np.ndarray, damping: float = 1.0
) -> Any:
  """Fits a linear map from the features of frames to their pixels.

  It is exact enough to see where things are, and takes seconds.

  Args:
    features: `[n, N, D]`.
    frames: uint8 `[n, h, w, 3]`.
    damping: Of ridge regression.

  Returns:
    From features `[..., N, D]` to pixels, float32 `[..., h, w, 3]`, 0..255.
  """
  x, y = (np.float32(a).reshape(len(features), -1) for a in (features, frames))
  middle, mean = x.mean(axis=0), y.mean(axis=0)
  x = x - middle
  square = x.T @ x + damping * np.eye(x.shape[1], dtype=np.float32)
  weights = np.linalg.solve(square, x.T @ (y - mean))

  def decode(features):
    shape = *np.shape(features)[:-2], *frames.shape[1:]
    flat = np.asarray(features, np.float32).reshape(-1, len(middle))
    decoded = (flat - middle) @ weights + mean
    return np.clip(decoded, 0, 255).reshape(shape)

  return decode
