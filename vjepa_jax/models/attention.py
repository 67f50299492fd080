"""Self-attention over tubelet tokens, behind one function for all kernels."""

from collections.abc import Callable
import functools

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import tpu_attention
from vjepa_jax.models.attention_mask import FULL, Mask
from vjepa_jax.models.linear import add_bias, einsum
from vjepa_jax.models.options import check_choice
from vjepa_jax.models.positions import Rope, rotate
from vjepa_jax.models.tubelets import pack, unpack
from vjepa_jax.parallel.sharding import map_rows


def choose_attention(platform: str, dtype: jnp.dtype) -> str:
  """Names the fastest of `IMPLEMENTATIONS` for a compute dtype.

  The platform ('cpu', 'gpu' or 'tpu') is that of the mesh's devices, never the
  default backend: a step is also compiled for devices that are not attached.
  cuDNN takes 16-bit floats only.
  """
  if platform == 'tpu':
    return 'pallas'
  if platform in ('gpu', 'cuda') and jnp.dtype(dtype).itemsize == 2:
    return 'cudnn'
  return 'xla'


def attend(
  q: jnp.ndarray,
  k: jnp.ndarray,
  v: jnp.ndarray,
  implementation: str,
  mask: Mask = FULL,
) -> jnp.ndarray:
  """Computes `softmax(q k^T / sqrt(d)) v`.

  Args:
    q, k, v: Queries, keys and values, `[B, heads, N, d]`.
    implementation: One of `IMPLEMENTATIONS`.
    mask: What a query sees.

  Returns:
    `[B, heads, N, d]` in the dtype of `v`; the softmax is in float32.

  Raises:
    UserError: There is no such implementation.
  """
  check_choice('attention', implementation, IMPLEMENTATIONS)
  return IMPLEMENTATIONS[implementation](q, k, v, mask)


def _attend_xla(q, k, v, mask):
  logits = jnp.einsum(
    'bhnd,bhmd->bhnm', q, k, preferred_element_type=jnp.float32
  )
  if mask != FULL:
    logits = jnp.where(mask.make_dense(q.shape[2]), logits, -jnp.inf)
  weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
  return jnp.einsum('bhnm,bhmd->bhnd', weights.astype(v.dtype), v)


def _attend_cudnn(q, k, v, mask):
  dense, num_tokens = None, q.shape[2]
  # The kernel's layout is [B, N, heads, d].
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  if mask != FULL:
    dense = mask.make_dense(num_tokens)
    if num_tokens % 2:
      # With a mask it takes an even number: one more, which none of them sees.
      q, k, v = (
        jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v)
      )
      dense = jnp.pad(dense, ((0, 0), (0, 1)))
      dense = jnp.pad(dense, ((0, 1), (0, 0)), constant_values=True)
    dense = dense[None, None]
  out = jax.nn.dot_product_attention(
    q, k, v, mask=dense, implementation='cudnn'
  )
  return out[:, :num_tokens].transpose(0, 2, 1, 3)


def _attend_splash(q, k, v, mask, interpret=False):
  num_heads, num_tokens, head_dim = q.shape[1:]
  padding = -num_tokens % tpu_attention.LANES
  length = num_tokens + padding
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v)
  )
  if mask == FULL:
    blocks = splash.FullMask((length, length))
  else:
    blocks = splash.CausalMask((length, length))
    blocks.q_sequence = mask.find_last_keys(np.arange(length, dtype=np.int32))
  # Of the blocks that tile the sequence the largest: the fewer there are, the
  # fewer partial sums of gradients.
  tiles = [n for n in range(128, 1025, 128) if length % n == 0]
  rows, keys = max(n for n in tiles if n <= 512), max(tiles)
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([blocks] * num_heads),
    block_sizes=splash.BlockSizes(
      block_q=rows,
      block_kv=keys,
      block_kv_compute=keys,
      block_q_dkv=rows,
      block_kv_dkv=keys,
      block_kv_dkv_compute=keys,
      block_q_dq=rows,
      block_kv_dq=keys,
    ),
    interpret=interpret,
  )
  segments = None
  if padding:
    is_token = (jnp.arange(length) < num_tokens).astype(jnp.int32)
    segments = splash.SegmentIds(is_token, is_token)

  def run(q, k, v):
    return jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)

  q = (q * head_dim**-0.5).astype(q.dtype)
  return map_rows(run)(q, k, v)[:, :, :num_tokens]


# By name: 'xla' on any platform, 'cudnn' on NVIDIA GPUs in 16 bits, 'pallas'
# (splash attention) on TPUs, and the same interpreted on any platform.
IMPLEMENTATIONS = {
  'xla': _attend_xla,
  'cudnn': _attend_cudnn,
  'pallas': _attend_splash,
  'pallas_interpret': functools.partial(_attend_splash, interpret=True),
}


class Attention(nn.Module):
  """Multi-head self-attention within one or several sequences."""

  num_heads: int
  kernel_init: Callable = nn.initializers.normal(0.02)  # query, key and value
  out_init: Callable = nn.initializers.normal(0.02)
  # 'pallas' uses `attend_lanes` for all sequences that it takes.
  implementation: str = 'xla'
  mask: Mask = FULL  # what a token sees of its sequence
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jnp.ndarray,
    rope: Rope | None = None,
    lengths: tuple[int, ...] | None = None,
  ) -> jnp.ndarray:
    """Attends within each sequence.

    Args:
      x: Tokens `[B, N, D]`.
      rope: Tables of make_rope_tables; for `uses_lanes`, of `widen_tables`.
      lengths: Tokens of each sequence, end to end along N; None for one.

    Returns:
      `[B, N, D]`.
    """
    width = x.shape[-1]
    head_dim = width // self.num_heads
    lengths = lengths or (x.shape[1],)
    projections = [
      _HeadProjection(
        num_heads=self.num_heads,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        width=width,
        name=name,
      )
      for name in ('query', 'key', 'value')
    ]
    kernel = self.param(
      'out_kernel', self.out_init, (self.num_heads, head_dim, width)
    )
    bias = self.param('out_bias', nn.initializers.zeros, (width,))
    if uses_lanes(self.implementation, head_dim, lengths, self.mask):
      heads = self._attend_lanes(x, projections, rope, lengths)  # [B, N, C]
      equation = 'bnc,cd->bnd'
      kernel = _fill_lanes(kernel, (0, 1)).reshape(-1, width)
    else:
      heads = self._attend_heads(x, projections, rope, lengths)  # [B, H, N, d]
      equation = 'bhnd,hdc->bnc'
    heads = checkpoint_name(heads, 'attention')
    return add_bias(einsum(equation, heads, kernel), bias)

  def _attend_heads(self, x, projections, rope, lengths):
    """Attention over `[B, H, N, d]`.

    Queries, keys and values are projected straight to this layout: the
    transposes of a fused projection cost more than the matmuls it saves.
    """
    q, k, v = (p(x) for p in projections)
    if rope is not None:
      q, k = rotate(q, rope), rotate(k, rope)
    parts = zip(*(unpack(a, lengths, axis=2) for a in (q, k, v)), strict=True)
    heads = [attend(*part, self.implementation, self.mask) for part in parts]
    return pack(heads, axis=2)[0]

  def _attend_lanes(self, x, projections, rope, lengths):
    """Attention over `[B, N, heads * slot]`, see tpu_attention."""
    width = x.shape[-1]
    head_dim = width // self.num_heads

    def interleave(arrays):
      filled = [_fill_lanes(a, (-2, -1)) for a in arrays]
      shape = *filled[0].shape[:-2], -1, tpu_attention.LANES
      return jnp.stack([a.reshape(shape) for a in filled], axis=-2)

    # One matmul for all three, their columns interleaved by 128.
    kernel = interleave([p.kernel for p in projections]).reshape(width, -1)
    bias = interleave([p.bias for p in projections])
    qkv = einsum('bnc,cd->bnd', x.astype(self.dtype), kernel)
    run = functools.partial(
      tpu_attention.attend_lanes,
      lengths=lengths,
      slot=tpu_attention.get_head_slot(head_dim),
      scale=head_dim**-0.5,
      interpret=self.implementation == 'pallas_interpret',
    )
    return map_rows(lambda qkv, bias, *rope: run(qkv, bias, rope=rope or None))(
      qkv, bias.reshape(1, -1), *(rope or ())
    )


class _HeadProjection(nn.Module):
  """Projects tokens `[B, N, width]` to heads `[B, heads, N, head_dim]`."""

  width: int
  num_heads: int
  kernel_init: Callable
  dtype: jnp.dtype

  def setup(self):
    heads = self.num_heads, self.width // self.num_heads
    self.kernel = self.param('kernel', self.kernel_init, (self.width, *heads))
    self.bias = self.param('bias', nn.initializers.zeros, heads)

  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    y = einsum('bnc,chd->bhnd', x.astype(self.dtype), self.kernel)
    return add_bias(y, self.bias[:, None])


def uses_lanes(
  implementation: str,
  head_dim: int,
  lengths: tuple[int, ...],
  mask: Mask = FULL,
) -> bool:
  """Whether `Attention` takes the kernel that keeps heads side by side."""
  slot = tpu_attention.get_head_slot(head_dim)
  return (
    implementation.startswith('pallas')
    and mask == FULL
    and slot is not None
    and 3 * slot <= 4 * head_dim  # else padding costs more than it saves
    and all(
      n % tpu_attention.SUBLANES == 0 and n <= tpu_attention.MAX_LENGTH
      for n in lengths
    )
  )


def widen_tables(rope: Rope, head_dim: int) -> Rope:
  """Repeats tables `[B, N, head_dim]` over 128 lanes, as the heads lie."""
  slot = tpu_attention.get_head_slot(head_dim)

  def widen(table):
    table = jnp.pad(table, ((0, 0), (0, 0), (0, slot - head_dim)))
    return jnp.tile(table, (1, 1, tpu_attention.LANES // slot))

  return tuple(map(widen, rope))


def _fill_lanes(x: jnp.ndarray, axes: tuple[int, int]) -> jnp.ndarray:
  """Pads the axes (heads, head_dim) with zeros to whole slots and lanes."""
  head_axis, dim_axis = (a % x.ndim for a in axes)
  slot = tpu_attention.get_head_slot(x.shape[dim_axis])
  padding = [(0, 0)] * x.ndim
  padding[head_axis] = (0, -x.shape[head_axis] % (tpu_attention.LANES // slot))
  padding[dim_axis] = (0, slot - x.shape[dim_axis])
  return jnp.pad(x, padding)
