"""The predictor: a narrow ViT from context features to target features."""

from flax import linen as nn
import jax.numpy as jnp

from vjepa_jax.models import transformer
from vjepa_jax.models.encoder import encode_positions
from vjepa_jax.models.positions import Grid


class Predictor(nn.Module):
  """Predicts features of hidden tokens from those of the visible ones.

  Context features, brought to `width`, and mask tokens, one for each hidden
  place, go through one transformer with full attention (V-JEPA 1, section 3).

  Attributes:
    out_width: Features of the encoder, which are also predicted.
    width: Features inside.
    depth: Number of blocks.
    num_heads: Attention heads. V-JEPA 1 has as many as the encoder, V-JEPA 2
      has 12.
    num_mask_tokens: Learned mask tokens: one a mask spec in V-JEPA 1; in
      V-JEPA 2 all specs share the first, so one is enough.
    positions, scale_init_by_depth, remat, attention, dtype: See `Encoder`.
  """

  out_width: int
  width: int = 384
  depth: int = 12
  num_heads: int = 12
  num_mask_tokens: int = 1
  positions: str = 'sincos'
  scale_init_by_depth: bool = False
  remat: str = 'none'
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    context: jnp.ndarray,
    context_ids: jnp.ndarray,
    target_ids: jnp.ndarray,
    grid: Grid,
    mask_index: int = 0,
  ) -> jnp.ndarray:
    """Predicts the features of `target_ids`.

    Args:
      context: Features of the visible tokens, `[B, Kc, out_width]`.
      context_ids: int32 `[B, Kc]`, raster order over (t, h, w).
      target_ids: int32 `[B, Kt]`, raster order over (t, h, w).
      grid: Tubelet grid that the ids refer to.
      mask_index: Which mask token to use; wraps around, so that specs share
        tokens where there are fewer than specs.

    Returns:
      `[B, Kt, out_width]` in the compute dtype.
    """
    num_context = context.shape[1]
    normal = nn.initializers.normal(0.02)
    x = nn.Dense(
      self.width, kernel_init=normal, dtype=self.dtype, name='embed'
    )(context)
    # Zero at first, as in every published config.
    mask_tokens = self.param(
      'mask_tokens', nn.initializers.zeros, (self.num_mask_tokens, self.width)
    )
    token = mask_tokens[mask_index % self.num_mask_tokens].astype(x.dtype)
    shape = (*target_ids.shape, self.width)
    x = jnp.concatenate([x, jnp.broadcast_to(token, shape)], axis=1)
    ids = jnp.concatenate([context_ids, target_ids], axis=1)
    x, rope = encode_positions(
      x, ids, grid, self.positions, self.width // self.num_heads
    )
    x = transformer.Transformer(
      self.depth,
      self.num_heads,
      4 * self.width,
      self.scale_init_by_depth,
      self.remat,
      self.attention,
      self.dtype,
      name='transformer',
    )(x, rope)
    x = transformer.layer_norm(self.dtype, 'norm')(x[:, num_context:])
    return nn.Dense(
      self.out_width, kernel_init=normal, dtype=self.dtype, name='proj'
    )(x)
