"""The video encoder: one module for the context and the target encoder."""

import math

from flax import linen as nn
import jax.numpy as jnp

from vjepa_jax.errors import UserError
from vjepa_jax.models import positions as pos
from vjepa_jax.models import transformer
from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.options import Options, check_choice
from vjepa_jax.models.positions import Grid
from vjepa_jax.models.tubelets import Tokens


def check_layers(
  layers: tuple[int, ...] | None, depth: int, levels: tuple[int, ...] = ()
) -> None:
  """Raises UserError unless the layers exist and increase."""
  if layers and list(layers) != sorted(set(layers) & {*range(depth)}):
    raise UserError(
      f'layers {layers} of an encoder with {depth} blocks: name some of 0 to '
      f'{depth - 1}, in increasing order'
    )
  if layers and levels and not set(layers) <= set(levels):
    raise UserError(
      f'layers {layers} of an encoder whose outputs are the levels {levels}: '
      'name some of these'
    )


class Encoder(Options):
  """Vision transformer over the tubelets of a clip."""

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  tubelet: tuple[int, int, int] = (2, 16, 16)  # frames, pixels, pixels
  # 'sincos' (V-JEPA 1), 'rope_tiled' (V-JEPA 2 as released),
  # 'rope_interleaved' (the exact rotation) or 'rope_rescaled' (the same, with
  # height and width of any grid stretched to [0, 15]: V-JEPA 2.1).
  positions: str = 'sincos'
  pixel_norm: str = 'imagenet'  # of uint8 pixels, see `tubelets.PIXEL_NORMS`
  drop_path_rate: float = 0.0  # see `transformer.Transformer`
  # Blocks whose outputs have a LayerNorm of their own, the last block among
  # them (V-JEPA 2.1); without any, all outputs share one.
  levels: tuple[int, ...] = ()
  # Embed clips of one frame, which are images, by a tubelet of one frame, and
  # add a vector of the modality to all tokens (V-JEPA 2.1).
  modalities: bool = False

  def __post_init__(self):
    check_choice('positions', self.positions, pos.POSITIONS)
    check_choice('pixel_norm', self.pixel_norm, tub.PIXEL_NORMS)
    if self.levels:
      check_layers(self.levels, self.depth)
      if self.levels[-1] != self.depth - 1:
        raise UserError(
          f'levels {self.levels} do not end with the last block, '
          f'{self.depth - 1}'
        )
    super().__post_init__()

  def is_image(self, video_shape: tuple[int, ...]) -> bool:
    """Says whether clips `[B, frames, h, w, 3]` are embedded as images."""
    return self.modalities and video_shape[1] == 1

  def compute_grid(self, video_shape: tuple[int, ...]) -> Grid:
    """Computes the tubelet grid of clips, see `tubelets.compute_grid`."""
    return tub.compute_grid(video_shape, self.get_tubelet(video_shape))

  def get_tubelet(self, video_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns the tubelet size for clips, which is another for images."""
    if self.is_image(video_shape):
      return (1, *self.tubelet[1:])
    return self.tubelet

  @nn.compact
  def __call__(
    self,
    video: jnp.ndarray,
    ids: Tokens | None = None,
    layers: tuple[int, ...] | None = None,
    coordinates: jnp.ndarray | None = None,
    dtype: jnp.dtype | None = None,
  ) -> Tokens | tuple[Tokens, ...]:
    """Encodes the visible tubelets of clips.

    Args:
      video: `[B, frames, height, width, 3]`, or images `[B, height, width, 3]`
        which are clips of one frame. Without `modalities` these are shown for
        the length of one tubelet. uint8 is normalised here; floats are taken
        as normalised.
      ids: Visible token ids, int32 `[B, K]`, raster order over (t, h, w); None
        for all tokens. Of a tuple each entry is encoded by itself, all of them
        in one pass.
      layers: Blocks whose outputs are wanted, counted from 0, increasing, each
        after the final LayerNorm (as probes of V-JEPA 2 read several); None for
        the last block alone.
      coordinates: float32 `[N, 3]`, (t, h, w) of all N tokens of the clip for
        RoPE; None for their places in its grid.
      dtype: Of the features; None for the compute dtype.

    Returns:
      Features `[B, K, width]`, after the final LayerNorm; a tuple for a tuple
      of ids; with `layers` a tuple of these, one a layer.

    Raises:
      UserError: A side of the clip is not a multiple of the tubelet's, or
        there are no such layers.
    """
    check_layers(layers, self.depth, self.levels)
    if video.ndim == 4:
      video = video[:, None]
    is_image = self.is_image(video.shape)
    if video.shape[1] == 1 and not is_image:
      video = jnp.repeat(video, self.tubelet[0], axis=1)
    grid = self.compute_grid(video.shape)
    if self.pixel_norm == 'clip' and video.dtype == jnp.uint8:
      video = tub.normalize_clips(video)
    x = tub.patchify(video, self.get_tubelet(video.shape))  # [B, N, P]
    lengths = (x.shape[1],)
    if ids is None:
      packed_ids = jnp.arange(x.shape[1])[None]
    else:
      packed_ids, lengths = tub.pack(ids if isinstance(ids, tuple) else (ids,))
      # Raw tubelets are gathered before their embedding: only the visible ones
      # cost anything, and the backward pass needs no scatter.
      x = tub.gather_tokens(x, packed_ids)
    x = self._embed(x, is_image)
    head_dim = self.width // self.num_heads
    x, rope = pos.encode_positions(
      x, packed_ids, grid, self.positions, head_dim, coordinates
    )
    if self.is_initializing():
      layers = self.levels or None
    x = transformer.Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      drop_path_rate=self.drop_path_rate,
      **self.get_options(),
      name='transformer',
    )(x, rope, lengths, layers)
    norm, *level_norms = (
      transformer.LayerNorm(dtype=dtype or self.dtype, name=name)
      for name in ('norm', *(f'norm_{level}' for level in self.levels[:-1]))
    )
    norms = dict(zip(self.levels, level_norms, strict=False))

    def finish(x, layer):
      x = norms.get(layer, norm)(x)
      return tub.unpack(x, lengths) if isinstance(ids, tuple) else x

    if layers is None:
      return finish(x, self.depth - 1)
    return tuple(map(finish, x, layers))

  def _embed(self, x, is_image):
    """Embeds flattened tubelets `[B, K, P]` -> `[B, K, width]`."""
    image, video = (
      tub.TubeletEmbed(
        width=self.width, init_std=self.init_std, dtype=self.dtype, name=name
      )
      for name in ('embed_image', 'embed')
    )
    if not self.modalities:
      return video(x)
    if self.is_initializing():  # Whichever is shown, both have parameters.
      pixels = 3 * math.prod(self.tubelet)
      image(jnp.zeros((1, 1, pixels // self.tubelet[0])))
      video(jnp.zeros((1, 1, pixels)))
    x = image(x) if is_image else video(x)
    return x + tub.get_modality(self, is_image, self.width, self.dtype)
