"""Linear layers in the compute dtype whose weights get float32 gradients.

A weight that is cast to bfloat16 before its matmul gets a bfloat16 gradient,
and it is that which the devices sum. Here the matmul of the gradient leaves its
float32 accumulator as it is, and the sum over devices is made in float32, as
the published systems do.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp


def make_initializer(
  std: float, num_inputs: int
) -> nn.initializers.Initializer:
  """Makes the initialiser of a kernel.

  Args:
    std: Standard deviation; 0 for `1 / sqrt(num_inputs)`, with which a layer
      keeps the size of what goes through it. The published .02 is about that
      at the width of the large models and too little for a narrow one.
    num_inputs: Inputs that are summed up.
  """
  return nn.initializers.normal(std or num_inputs**-0.5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Contracts activations with a parameter, in the dtype of the activations.

  Args:
    equation: Of `jnp.einsum`, each index in two of the three terms.
    x: Activations.
    kernel: Parameter, float32; its gradient is float32 too.

  Returns:
    The contraction in the dtype of `x`.
  """
  return jnp.einsum(equation, x, kernel.astype(x.dtype))


def _einsum_forward(equation, x, kernel):
  # Not `einsum`: a checkpoint policy that keeps matmuls has to see one.
  return jnp.einsum(equation, x, kernel.astype(x.dtype)), (x, kernel)


def _einsum_backward(equation, saved, gradient):
  x, kernel = saved
  terms, out = equation.split('->')
  left, right = terms.split(',')
  d_x = jnp.einsum(
    f'{out},{right}->{left}', gradient, kernel.astype(gradient.dtype)
  )
  d_kernel = jnp.einsum(
    f'{left},{out}->{right}',
    x,
    gradient,
    preferred_element_type=kernel.dtype,
  )
  return d_x, d_kernel


einsum.defvjp(_einsum_forward, _einsum_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a float32 parameter that broadcasts against `x`, in its dtype."""
  return x + bias.astype(x.dtype)


def _add_bias_forward(x, bias):
  return add_bias(x, bias), bias


def _add_bias_backward(bias, gradient):
  # What broadcasting copies, its transpose adds up.
  _, add_up = jax.vjp(lambda b: jnp.broadcast_to(b, gradient.shape), bias)
  return gradient, *add_up(gradient.astype(bias.dtype))


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Dense(nn.Module):
  """`[B, N, C]` -> `[B, N, features]`, with the parameters of `nn.Dense`."""

  features: int
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = x.shape[-1], self.features
    kernel = self.param('kernel', self.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    y = einsum('bnc,cd->bnd', x.astype(self.dtype), kernel)
    return add_bias(y, bias)
