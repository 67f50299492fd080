"""The feature decoder: frozen features to the pixels of their tubelets."""

from flax import linen as nn
import jax.numpy as jnp

from vjepa_jax.models import transformer
from vjepa_jax.models.linear import Dense, make_initializer
from vjepa_jax.models.positions import Grid, encode_positions


class FeatureDecoder(nn.Module):
  """A small transformer from features of tokens to pixels of tubelets.

  It shows what features hold; nothing that it learns reaches the encoder.
  V-JEPA 1 (section 6) decodes predictions with a diffusion model, this is the
  plain regression: where features leave several pictures open it paints their
  mean. A linear map of each token by itself, which is learned first, is added
  to what the transformer makes of all of them.
  """

  out_width: int  # numbers of a tubelet, t * p * p * 3
  width: int = 384  # of features inside, divisible by num_heads
  depth: int = 4
  num_heads: int = 6
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, features: jnp.ndarray, grid: Grid) -> jnp.ndarray:
    """Decodes clips.

    Args:
      features: `[B, N, D]` of all tokens, raster order over (t, h, w), in the
        space that the predictor predicts.
      grid: Tubelet grid (T, H, W).

    Returns:
      float32 `[B, N, out_width]`: pixels as the encoder sees them (normalised),
      ordered as by `tubelets.patchify`.
    """

    def project(x, features, init, name):
      return Dense(
        features=features, kernel_init=init, dtype=self.dtype, name=name
      )(x)

    init = make_initializer(0.0, features.shape[-1])
    x = project(features, self.width, init, 'embed')
    x, _ = encode_positions(x, jnp.arange(x.shape[1])[None], grid, 'sincos', 0)
    x = transformer.Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_dim=4 * self.width,
      init_std=0.0,
      scale_init_by_depth=True,
      attention=self.attention,
      dtype=self.dtype,
      name='transformer',
    )(x)
    x = transformer.LayerNorm(dtype=self.dtype, name='norm')(x)
    # From zero: what is random at first stays for long, as noise.
    zeros = nn.initializers.zeros
    pixels = project(x, self.out_width, zeros, 'proj')
    pixels += project(features, self.out_width, zeros, 'linear')
    return pixels.astype(jnp.float32)
