"""Probes: small classifiers on frozen features."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models.attention import attend
from vjepa_jax.models.transformer import Mlp


class AttentiveProbe(nn.Module):
  """The attentive probe of V-JEPA 1: one learned query attends to all tokens.

  A cross-attention block (its attention has no output projection) and a linear
  classifier (V-JEPA 1, section 4.1).

  Attributes:
    num_classes: Number of classes.
    num_heads: Attention heads; they divide the features.
  """

  num_classes: int
  num_heads: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps features `[B, N, D]` to logits `[B, num_classes]`."""
    batch, _, width = features.shape
    normal = nn.initializers.normal(0.02)
    query = self.param('query', normal, (1, 1, width))
    query = jnp.broadcast_to(query, (batch, 1, width))
    # Probes normalise with epsilon 1e-5, encoders with 1e-6; the query is not
    # normalised at all.
    y = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name='norm1')(
      features
    )

    def project(x, name):
      x = nn.Dense(width, kernel_init=normal, name=name)(x)
      x = x.reshape(batch, -1, self.num_heads, width // self.num_heads)
      return x.transpose(0, 2, 1, 3)

    heads = attend(
      project(query, 'query_proj'),
      project(y, 'key_proj'),
      project(y, 'value_proj'),
      'xla',
    )
    x = query + heads.transpose(0, 2, 1, 3).reshape(batch, 1, width)
    y = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name='norm2')(x)
    x = x + Mlp(4 * width, name='mlp')(y)
    return nn.Dense(self.num_classes, kernel_init=normal, name='classifier')(
      x[:, 0]
    )
