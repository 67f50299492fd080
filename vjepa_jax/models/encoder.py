"""The video encoder: one module for the context and the target encoder."""

from flax import linen as nn
import jax.numpy as jnp

from vjepa_jax.models import positions as pos
from vjepa_jax.models import transformer
from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.options import Options, check_choice
from vjepa_jax.models.tubelets import Tokens


def check_layers(layers: tuple[int, ...] | None, depth: int) -> None:
  """Raises ValueError unless the layers exist and increase."""
  if layers and list(layers) != sorted(set(layers) & {*range(depth)}):
    raise ValueError(
      f'layers {layers} of an encoder with {depth} blocks: name some of 0 to '
      f'{depth - 1}, in increasing order'
    )


class Encoder(Options):
  """Vision transformer over the tubelets of a clip."""

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  tubelet: tuple[int, int, int] = (2, 16, 16)  # frames, pixels, pixels
  # 'sincos' (V-JEPA 1), 'rope_tiled' (V-JEPA 2 as released) or
  # 'rope_interleaved' (the exact rotation).
  positions: str = 'sincos'
  pixel_norm: str = 'imagenet'  # of uint8 pixels, see `tubelets.PIXEL_NORMS`
  drop_path_rate: float = 0.0  # see `transformer.Transformer`

  def __post_init__(self):
    check_choice('positions', self.positions, pos.POSITIONS)
    check_choice('pixel_norm', self.pixel_norm, tub.PIXEL_NORMS)
    super().__post_init__()

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
        which are shown for the length of one tubelet, as a clip of one frame
        is. uint8 is normalised here; floats are taken as normalised.
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
      ValueError: A side of the clip is not a multiple of the tubelet's, or
        there are no such layers.
    """
    check_layers(layers, self.depth)
    if video.ndim == 4:
      video = video[:, None]
    if video.shape[1] == 1:
      video = jnp.repeat(video, self.tubelet[0], axis=1)
    grid = tub.compute_grid(video.shape, self.tubelet)
    if self.pixel_norm == 'clip' and video.dtype == jnp.uint8:
      video = tub.normalize_clips(video)
    x = tub.patchify(video, self.tubelet)  # [B, N, P]
    lengths = (x.shape[1],)
    if ids is None:
      packed_ids = jnp.arange(x.shape[1])[None]
    else:
      packed_ids, lengths = tub.pack(ids if isinstance(ids, tuple) else (ids,))
      # Raw tubelets are gathered before their embedding: only the visible ones
      # cost anything, and the backward pass needs no scatter.
      x = tub.gather_tokens(x, packed_ids)
    x = tub.TubeletEmbed(
      width=self.width, init_std=self.init_std, dtype=self.dtype, name='embed'
    )(x)
    head_dim = self.width // self.num_heads
    x, rope = pos.encode_positions(
      x, packed_ids, grid, self.positions, head_dim, coordinates
    )
    x = transformer.Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      drop_path_rate=self.drop_path_rate,
      **self.get_options(),
      name='transformer',
    )(x, rope, lengths, layers)
    norm = transformer.LayerNorm(dtype=dtype or self.dtype, name='norm')

    def finish(x):
      x = norm(x)
      return tub.unpack(x, lengths) if isinstance(ids, tuple) else x

    return finish(x) if layers is None else tuple(map(finish, x))
