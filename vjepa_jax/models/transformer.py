"""Pre-norm transformer blocks, scanned over depth."""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models.attention import Attention, uses_lanes, widen_tables
from vjepa_jax.models.linear import Dense, make_initializer
from vjepa_jax.parallel.sharding import constrain_batch

REMAT_POLICIES = ('none', 'attention', 'dots', 'full')


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
    """Normalises `[B, N, D]` over its features."""
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
  return d_x.astype(x.dtype), (g * normal).sum((0, 1)), g.sum((0, 1))


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
    x = Dense(self.hidden, self.kernel_init, self.dtype, name='fc1')(x)
    return Dense(width, self.out_init, self.dtype, name='fc2')(gelu(x))


class Block(nn.Module):
  """Pre-norm block: attention, then the perceptron, each with a residual.

  Attributes:
    num_heads: Attention heads.
    mlp_dim: Hidden features of the perceptron.
    init_std: Standard deviation of the kernels at initialisation, see
      `linear.make_initializer`.
    scale_init_by_depth: Scale the kernels that write to the residual stream by
      `1 / sqrt(2 (layer + 1))` at initialisation (V-JEPA 2; in V-JEPA 1 the
      rescale is overwritten and has no effect).
    attention: Attention kernel, see `attention.attend`.
    dtype: Compute dtype.
    drop_path_slope: By how much the probability to drop a branch grows from
      one block to the next, from 0 in the first, see `Transformer`.
  """

  num_heads: int
  mlp_dim: int
  init_std: float = 0.02
  scale_init_by_depth: bool = False
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  drop_path_slope: float = 0.0

  @nn.compact
  def __call__(self, x, layer, rope, lengths):
    """Maps `x` `[B, N, D]` to the same; `layer` is the block's index, int."""

    width = x.shape[-1]
    kernel_init = make_initializer(self.init_std, width)

    def out_init(key, shape, dtype=jnp.float32):
      num_inputs = math.prod(shape[:-1])
      kernel = make_initializer(self.init_std, num_inputs)(key, shape, dtype)
      if self.scale_init_by_depth:
        kernel *= (2.0 * (layer + 1)) ** -0.5
      return kernel

    y = LayerNorm(self.dtype, name='norm1')(x)
    y = Attention(
      self.num_heads,
      kernel_init,
      out_init,
      self.attention,
      self.dtype,
      name='attention',
    )(y, rope, lengths)
    x = x + self._drop_path(y, layer)
    y = LayerNorm(self.dtype, name='norm2')(x)
    mlp = Mlp(self.mlp_dim, kernel_init, out_init, self.dtype, name='mlp')
    return x + self._drop_path(mlp(y), layer)

  def _drop_path(self, y, layer):
    """Drops the branch of some clips, and scales it up for the others."""
    if not (self.drop_path_slope and self.has_rng('drop_path')):
      return y
    keep = 1.0 - self.drop_path_slope * layer
    kept = jax.random.bernoulli(
      self.make_rng('drop_path'), keep, (y.shape[0], 1, 1)
    )
    return y * (kept / keep).astype(y.dtype)


class Transformer(nn.Module):
  """`depth` blocks as one scan; parameters have a leading depth axis.

  A scan compiles one block, whatever the depth: minutes and gigabytes less
  than an unrolled stack on a TPU, at a few percent of its speed.

  Attributes:
    depth: Number of blocks.
    remat: What the backward pass recomputes. 'none': nothing. 'full': the
      whole block, keeping its input only. 'attention': the same but for the
      output of the attention kernel. 'dots': all but the matmuls without batch
      dimensions.
    drop_path_rate: Probability that the last block leaves out a branch of a
      clip, attention or perceptron; it grows linearly from 0 in the first
      block (stochastic depth, arXiv 1603.09382). Only where `apply` is given
      an rng 'drop_path': never in evaluation.
    (others): See `Block`.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  init_std: float = 0.02
  scale_init_by_depth: bool = False
  remat: str = 'none'
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  drop_path_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jnp.ndarray,
    rope: tuple[jnp.ndarray, jnp.ndarray] | None = None,
    lengths: tuple[int, ...] | None = None,
    layers: tuple[int, ...] | None = None,
  ) -> jnp.ndarray:
    """Maps tokens to tokens.

    Args:
      x: `[B, N, D]`.
      rope: Tables of make_rope_tables for these tokens.
      lengths: Tokens of each sequence, end to end along N; None for one. No
        token sees another sequence.
      layers: Blocks whose outputs are wanted, increasing; None for the last.

    Returns:
      `[B, N, D]`; with `layers` `[B, len(layers), N, D]`.
    """
    lengths = lengths or (x.shape[1],)
    head_dim = x.shape[-1] // self.num_heads
    if rope is not None and uses_lanes(self.attention, head_dim, lengths):
      rope = widen_tables(rope, head_dim)

    def body(block, x, layer):
      return constrain_batch(
        block(constrain_batch(x), layer, rope, lengths)
      ), None

    if self.remat not in REMAT_POLICIES:
      raise ValueError(f'remat {self.remat!r} is not one of {REMAT_POLICIES}')
    if self.remat != 'none':
      policies = jax.checkpoint_policies
      policy = {
        'full': None,
        'attention': policies.save_only_these_names('attention'),
        'dots': policies.dots_with_no_batch_dims_saveable,
      }[self.remat]
      # Inside a scan XLA cannot undo the recomputation, so CSE may stay on.
      body = nn.remat(body, prevent_cse=False, policy=policy)
    block = Block(
      self.num_heads,
      self.mlp_dim,
      self.init_std,
      self.scale_init_by_depth,
      self.attention,
      self.dtype,
      self.drop_path_rate / max(self.depth - 1, 1),
      name='blocks',
    )

    def collect(block, carry, layer):
      x, outputs = carry
      x, _ = body(block, x, layer)
      # Outputs go to the place of the next block that is wanted, where its own
      # is the last; those after all of them go nowhere.
      place = jnp.searchsorted(jnp.array(layers), layer)
      return (x, outputs.at[:, place].set(x, mode='drop')), None

    scan = nn.scan(
      body if layers is None else collect,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'drop_path': True},
      length=self.depth,
    )
    if layers is None:
      x, _ = scan(block, x, jnp.arange(self.depth))
      return x
    outputs = jnp.zeros((x.shape[0], len(layers), *x.shape[1:]), x.dtype)
    (_, outputs), _ = scan(block, (x, outputs), jnp.arange(self.depth))
    return outputs
