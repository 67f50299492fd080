"""Pre-norm transformer blocks, scanned over depth."""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models.attention import Attention, uses_lanes, widen_tables
from vjepa_jax.models.attention_mask import FULL, Mask
from vjepa_jax.models.linear import Dense, make_initializer
from vjepa_jax.models.options import Options, check_choice
from vjepa_jax.models.positions import Rope
from vjepa_jax.parallel.sharding import constrain_batch

_POLICIES = jax.checkpoint_policies
# What of a block is kept for the backward pass, see `Options.remat`.
REMAT_POLICIES = {
  'none': None,
  'attention': _POLICIES.save_only_these_names('attention'),
  'dots': _POLICIES.dots_with_no_batch_dims_saveable,
  'full': None,
}


@jax.custom_vjp
def gelu(x: jnp.ndarray) -> jnp.ndarray:
  """Exact GELU, by erf in float32; the backward pass keeps its input only.

  `jax.nn.gelu(approximate=False)` goes through erfc, which XLA:TPU compiles to
  a slower program with extra intermediates.
  """
  y = x.astype(jnp.float32)
  return (y * _normal_cdf(y)).astype(x.dtype)


def _gelu_forward(x):
  return gelu(x), x


def _gelu_backward(x, gradient):
  y = x.astype(jnp.float32)
  density = (2 * math.pi) ** -0.5 * jnp.exp(-0.5 * jnp.square(y))
  slope = _normal_cdf(y) + y * density
  return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x):
  return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


class LayerNorm(nn.Module):
  """LayerNorm as published: epsilon 1e-6, float32 statistics of two passes.

  The backward pass keeps the input and two numbers a token; the parameters are
  those of `nn.LayerNorm`, whose gradient would keep the normalised input too.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    """Normalises `[..., D]` over its features."""
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return _normalize(x, scale, bias, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x, scale, bias, dtype):
  return _normalize_forward(x, scale, bias, dtype)[0]


def _normalize_forward(x, scale, bias, dtype):
  y = x.astype(jnp.float32)
  mean = y.mean(axis=-1, keepdims=True)
  # E[x^2] - E[x]^2, in one pass, costs digits.
  variance = jnp.square(y - mean).mean(axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + 1e-6)
  out = (y - mean) * inverse * scale + bias
  return out.astype(dtype), (x, scale, mean, inverse)


def _normalize_backward(dtype, saved, gradient):
  x, scale, mean, inverse = saved
  g = gradient.astype(jnp.float32)
  normal = (x.astype(jnp.float32) - mean) * inverse
  h = g * scale
  d_x = inverse * (
    h
    - h.mean(axis=-1, keepdims=True)
    - normal * (h * normal).mean(axis=-1, keepdims=True)
  )
  tokens = tuple(range(g.ndim - 1))
  return d_x.astype(x.dtype), (g * normal).sum(tokens), g.sum(tokens)


_normalize.defvjp(_normalize_forward, _normalize_backward)


class Mlp(nn.Module):
  """Two-layer perceptron with GELU, `[B, N, D]` -> `[B, N, D]`."""

  hidden: int
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  out_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    width = x.shape[-1]
    x = Dense(
      features=self.hidden,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      name='fc1',
    )(x)
    return Dense(
      features=width, kernel_init=self.out_init, dtype=self.dtype, name='fc2'
    )(gelu(x))


class Block(Options):
  """Pre-norm block: attention, then the perceptron, each with a residual."""

  num_heads: int
  mlp_dim: int
  mask: Mask = FULL
  drop_path_slope: float = 0.0  # of `Transformer.drop_path_rate`, a block

  @nn.compact
  def __call__(self, x, layer, rope, lengths):
    """Maps `x` `[B, N, D]` to the same; `layer` is the block's index, int."""

    def out_init(key, shape, dtype=jnp.float32):
      num_inputs = math.prod(shape[:-1])
      kernel = make_initializer(self.init_std, num_inputs)(key, shape, dtype)
      if self.scale_init_by_depth:
        kernel *= (2.0 * (layer + 1)) ** -0.5
      return kernel

    common = dict(
      kernel_init=make_initializer(self.init_std, x.shape[-1]),
      out_init=out_init,
      dtype=self.dtype,
    )
    y = LayerNorm(dtype=self.dtype, name='norm1')(x)
    y = Attention(
      num_heads=self.num_heads,
      implementation=self.attention,
      mask=self.mask,
      **common,
      name='attention',
    )(y, rope, lengths)
    x = x + self._drop_path(y, layer)
    y = LayerNorm(dtype=self.dtype, name='norm2')(x)
    y = Mlp(hidden=self.mlp_dim, **common, name='mlp')(y)
    return x + self._drop_path(y, layer)

  def _drop_path(self, y, layer):
    """Drops the branch of some clips, and scales it up for the others."""
    if not (self.drop_path_slope and self.has_rng('drop_path')):
      return y
    keep = 1.0 - self.drop_path_slope * layer
    kept = jax.random.bernoulli(
      self.make_rng('drop_path'), keep, (y.shape[0], 1, 1)
    )
    return y * (kept / keep).astype(y.dtype)


class Transformer(Options):
  """`depth` blocks as one scan; parameters have a leading depth axis.

  A scan compiles one block, whatever the depth: minutes and gigabytes less
  than an unrolled stack on a TPU, at a few percent of its speed.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  mask: Mask = FULL
  # Probability that the last block leaves out a branch of a clip, attention or
  # perceptron; it grows linearly from 0 in the first block (stochastic depth,
  # arXiv 1603.09382). Only where `apply` is given an rng 'drop_path': never in
  # evaluation.
  drop_path_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jnp.ndarray,
    rope: Rope | None = None,
    lengths: tuple[int, ...] | None = None,
    layers: tuple[int, ...] | None = None,
  ) -> jnp.ndarray | tuple[jnp.ndarray, ...]:
    """Maps tokens to tokens.

    Args:
      x: `[B, N, D]`.
      rope: Tables of make_rope_tables for these tokens.
      lengths: Tokens of each sequence, end to end along N; None for one. No
        token sees another sequence.
      layers: Blocks whose outputs are wanted; None for the last.

    Returns:
      `[B, N, D]`; with `layers` a tuple, one a layer.
    """
    lengths = lengths or (x.shape[1],)
    head_dim = x.shape[-1] // self.num_heads
    lanes = uses_lanes(self.attention, head_dim, lengths, self.mask)
    if rope is not None and lanes:
      rope = widen_tables(rope, head_dim)

    def run(block, x, layer):
      return constrain_batch(block(constrain_batch(x), layer, rope, lengths))

    check_choice('remat', self.remat, REMAT_POLICIES)
    if self.remat != 'none':
      # Inside a scan XLA cannot undo the recomputation, so CSE may stay on.
      policy = REMAT_POLICIES[self.remat]
      run = nn.remat(run, prevent_cse=False, policy=policy)

    def body(block, carry, layer):
      x, outputs = carry
      x = run(block, x, layer)
      if layers:
        # Carried, not stacked: a stack would hold the outputs of all blocks.
        # Each block writes to the place of the next one that is wanted, which
        # writes last; those after the last one to a place of their own.
        place = jnp.searchsorted(jnp.asarray(layers), layer)
        outputs = jax.lax.dynamic_update_index_in_dim(outputs, x, place, 0)
      return (x, outputs), None

    block = Block(
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      mask=self.mask,
      drop_path_slope=self.drop_path_rate / max(self.depth - 1, 1),
      **self.get_options(),
      name='blocks',
    )
    scan = nn.scan(
      body,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'drop_path': True},
      length=self.depth,
    )
    outputs = ()
    if layers:
      count = len(layers) + (layers[-1] < self.depth - 1)
      outputs = jnp.zeros((count, *x.shape), x.dtype)
    (x, outputs), _ = scan(block, (x, outputs), jnp.arange(self.depth))
    return x if layers is None else tuple(outputs[: len(layers)])
