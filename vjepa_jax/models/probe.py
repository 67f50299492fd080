"""Probes: small classifiers on frozen features."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models.attention import Attention, attend
from vjepa_jax.models.transformer import Mlp


class AttentiveProbe(nn.Module):
  """The published probes: self-attention, then one learned query.

  `depth` self-attention blocks over all tokens without positions; a block in
  which one query attends to them, itself not normalised; a linear classifier.
  Probes of V-JEPA 1 (section 4.1) have no self-attention and project what the
  query attended to; those of V-JEPA 2 (section 5) have 3 blocks and do not.
  """

  num_classes: int
  num_heads: int
  depth: int = 0
  output_projection: bool = True
  # Of the LayerNorms. The official probes have 1e-5; the classifiers of Hugging
  # Face take their encoder's, 1e-6.
  epsilon: float = 1e-5
  attention: str = 'xla'  # of the blocks, see `attention.attend`
  dtype: jnp.dtype = jnp.float32  # of computation; logits are float32

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps features `[B, N, D]` to logits `[B, num_classes]`."""
    batch, _, width = features.shape
    normal = nn.initializers.normal(0.02)
    features = features.astype(self.dtype)
    dense = functools.partial(
      nn.Dense, features=width, dtype=self.dtype, kernel_init=normal
    )

    def project(x, name):
      x = dense(name=name)(x)
      x = x.reshape(batch, -1, self.num_heads, width // self.num_heads)
      return x.transpose(0, 2, 1, 3)

    for i in range(self.depth):
      features = _ProbeBlock(
        num_heads=self.num_heads,
        epsilon=self.epsilon,
        attention=self.attention,
        dtype=self.dtype,
        name=f'block_{i}',
      )(features)
    query = self.param('query', normal, (1, 1, width))
    query = jnp.broadcast_to(query, (batch, 1, width)).astype(self.dtype)
    y = _make_norm(self, 'norm1')(features)
    heads = attend(
      project(query, 'query_proj'),
      project(y, 'key_proj'),
      project(y, 'value_proj'),
      'xla',
    )
    y = heads.transpose(0, 2, 1, 3).reshape(batch, 1, width)
    if self.output_projection:
      y = dense(name='out_proj')(y)
    x = query + y
    y = _make_norm(self, 'norm2')(x)
    x = x + Mlp(hidden=4 * width, dtype=self.dtype, name='mlp')(y)
    classifier = nn.Dense(
      features=self.num_classes, kernel_init=normal, name='classifier'
    )
    return classifier(x[:, 0].astype(jnp.float32))


def compute_attention(
  probe: AttentiveProbe, params: Any, features: jax.Array
) -> jax.Array:
  """Computes where the learned query looks among features `[B, N, D]`.

  Returns:
    float32 `[B, N]`, the mean over heads; each row sums to 1.
  """
  _, captured = probe.apply(
    {'params': params},
    features,
    capture_intermediates=lambda module, _: (
      module.name in ('query_proj', 'key_proj')
    ),
    mutable='intermediates',
  )
  query, key = (
    captured['intermediates'][name]['__call__'][0].astype(jnp.float32)
    for name in ('query_proj', 'key_proj')
  )
  heads = probe.num_heads
  query, key = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key))
  scores = jnp.einsum('bqhd,bnhd->bhn', query, key) / key.shape[-1] ** 0.5
  return jax.nn.softmax(scores).mean(axis=1)


class _ProbeBlock(nn.Module):
  """A block as the encoder's, but with the epsilon of probes."""

  num_heads: int
  epsilon: float
  attention: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens `[B, N, D]` to the same."""
    attention = Attention(
      num_heads=self.num_heads,
      implementation=self.attention,
      dtype=self.dtype,
      name='attention',
    )
    mlp = Mlp(hidden=4 * x.shape[-1], dtype=self.dtype, name='mlp')
    x = x + attention(_make_norm(self, 'norm1')(x))
    return x + mlp(_make_norm(self, 'norm2')(x))


def _make_norm(module: nn.Module, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=module.epsilon,
    dtype=module.dtype,
    use_fast_variance=False,
    name=name,
  )


class LinearProbe(nn.Module):
  """A linear classifier of the mean over tokens, normalised.

  The normalisation has no parameters: features of encoders differ in size by
  orders of magnitude, and one grid of learning rates has to fit them all.
  """

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps features `[B, N, D]` to logits `[B, num_classes]`."""
    x = features.astype(jnp.float32).mean(axis=1)
    x = nn.LayerNorm(use_bias=False, use_scale=False)(x)
    init = nn.initializers.normal(0.01)
    return nn.Dense(
      features=self.num_classes, kernel_init=init, name='classifier'
    )(x)
