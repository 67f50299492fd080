"""Self-attention over tubelet tokens, behind one function for all kernels."""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models.positions import rotate


def _attend_xla(q: jnp.ndarray, k: jnp.ndarray, v: jnp.ndarray) -> jnp.ndarray:
  logits = jnp.einsum(
    'bhnd,bhmd->bhnm', q, k, preferred_element_type=jnp.float32
  )
  weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
  return jnp.einsum('bhnm,bhmd->bhnd', weights.astype(v.dtype), v)


def _attend_cudnn(
  q: jnp.ndarray, k: jnp.ndarray, v: jnp.ndarray
) -> jnp.ndarray:
  # The kernel's layout is [B, N, heads, d].
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  out = jax.nn.dot_product_attention(q, k, v, implementation='cudnn')
  return out.transpose(0, 2, 1, 3)


_KERNELS = {'xla': _attend_xla, 'cudnn': _attend_cudnn}


def choose_attention(platform: str, dtype: jnp.dtype) -> str:
  """Names the fastest attention kernel for a platform.

  Args:
    platform: Platform of the mesh's devices ('cpu', 'gpu' or 'tpu'); never the
      default backend, because a step is also compiled for devices that are not
      attached.
    dtype: Compute dtype; the cuDNN kernel takes 16-bit floats only.

  Returns:
    A name that `attend` accepts.
  """
  if platform in ('gpu', 'cuda') and jnp.dtype(dtype).itemsize == 2:
    return 'cudnn'
  return 'xla'


def attend(
  q: jnp.ndarray, k: jnp.ndarray, v: jnp.ndarray, implementation: str
) -> jnp.ndarray:
  """Computes `softmax(q k^T / sqrt(d)) v` without a mask.

  Args:
    q: Queries, `[B, heads, N, d]`.
    k: Keys, `[B, heads, M, d]`.
    v: Values, `[B, heads, M, d]`.
    implementation: 'xla' (any platform) or 'cudnn' (NVIDIA GPUs, 16-bit).

  Returns:
    `[B, heads, N, d]` in the dtype of `v`; the softmax is in float32.
  """
  if implementation not in _KERNELS:
    raise ValueError(
      f'attention {implementation!r} is not one of {sorted(_KERNELS)}'
    )
  return _KERNELS[implementation](q, k, v)


class Attention(nn.Module):
  """Multi-head self-attention with head-major projections.

  Queries, keys and values are projected straight to `[B, heads, N, d]`: on a
  TPU the transposes of a fused projection cost more than the matmuls they save.

  Attributes:
    num_heads: Attention heads; they divide the width.
    out_init: Initialiser of the output projection's kernel.
    implementation: Kernel, see `attend`.
    dtype: Compute dtype.
  """

  num_heads: int
  out_init: Callable = nn.initializers.normal(0.02)
  implementation: str = 'xla'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jnp.ndarray,
    rope: tuple[jnp.ndarray, jnp.ndarray] | None = None,
  ) -> jnp.ndarray:
    """Maps tokens `[B, N, D]` to `[B, N, D]`; `rope` from make_rope_tables."""
    width = x.shape[-1]
    head_dim = width // self.num_heads
    q, k, v = (
      _HeadProjection(self.num_heads, head_dim, self.dtype, name=name)(x)
      for name in ('query', 'key', 'value')
    )
    if rope is not None:
      q, k = rotate(q, rope), rotate(k, rope)
    heads = attend(q, k, v, self.implementation)  # [B, H, N, d]
    kernel = self.param(
      'out_kernel', self.out_init, (self.num_heads, head_dim, width)
    )
    bias = self.param('out_bias', nn.initializers.zeros, (width,))
    out = jnp.einsum('bhnd,hdc->bnc', heads, kernel.astype(self.dtype))
    return out + bias.astype(self.dtype)


class _HeadProjection(nn.Module):
  """Projects tokens `[B, N, D]` to heads `[B, heads, N, head_dim]`."""

  num_heads: int
  head_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    kernel = self.param(
      'kernel',
      nn.initializers.normal(0.02),
      (x.shape[-1], self.num_heads, self.head_dim),
    )
    bias = self.param(
      'bias', nn.initializers.zeros, (self.num_heads, self.head_dim)
    )
    y = jnp.einsum('bnc,chd->bhnd', x, kernel.astype(self.dtype))
    return y + bias[:, None].astype(self.dtype)
