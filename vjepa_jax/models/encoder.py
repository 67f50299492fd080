"""The video encoder: one module for the context and the target encoder."""

from flax import linen as nn
import jax.numpy as jnp

from vjepa_jax.models import positions as pos
from vjepa_jax.models import transformer
from vjepa_jax.models import tubelets as tub

POSITIONS = ('sincos', 'rope_tiled', 'rope_interleaved')


def check_positions(positions: str) -> None:
  """Raises ValueError unless `positions` names a known encoding."""
  if positions not in POSITIONS:
    raise ValueError(f'positions {positions!r} is not one of {POSITIONS}')


def encode_positions(
  x: jnp.ndarray,
  ids: jnp.ndarray,
  grid: pos.Grid,
  positions: str,
  head_dim: int,
) -> tuple[jnp.ndarray, tuple[jnp.ndarray, jnp.ndarray] | None]:
  """Adds sincos positions to tokens, or makes the tables of RoPE.

  Args:
    x: Tokens `[B, K, D]`.
    ids: Their ids, int32 `[B, K]`, raster order over (t, h, w); `[1, K]` where
      all clips have the same.
    grid: Tubelet grid that the ids refer to.
    positions: One of `POSITIONS`.
    head_dim: Channels of one attention head.

  Returns:
    The tokens, and the rope argument of the transformer (None for sincos).
  """
  check_positions(positions)
  if positions == 'sincos':
    table = jnp.asarray(pos.make_sincos_table(grid, x.shape[-1]), x.dtype)
    return x + table[ids], None
  style = positions.removeprefix('rope_')
  return x, pos.make_rope_tables(ids, grid, head_dim, style)


def check_pixel_norm(pixel_norm: str) -> None:
  """Raises ValueError unless `pixel_norm` names a known normalisation."""
  if pixel_norm not in tub.PIXEL_NORMS:
    raise ValueError(
      f'pixel_norm {pixel_norm!r} is not one of {tub.PIXEL_NORMS}'
    )


def check_layers(layers: tuple[int, ...] | None, depth: int) -> None:
  """Raises ValueError unless the layers exist and increase."""
  if layers is None:
    return
  if list(layers) != sorted(set(layers)) or not set(layers) <= {*range(depth)}:
    raise ValueError(
      f'layers {layers} of an encoder with {depth} blocks: name some of 0 to '
      f'{depth - 1}, in increasing order'
    )


class Encoder(nn.Module):
  """Vision transformer over the tubelets of a clip.

  Attributes:
    width: Features of a token.
    depth: Number of blocks.
    num_heads: Attention heads.
    mlp_dim: Hidden features of the perceptrons.
    tubelet: Tubelet size in (frames, pixels, pixels).
    positions: 'sincos' (V-JEPA 1), 'rope_tiled' (V-JEPA 2 as released) or
      'rope_interleaved' (the exact rotation).
    pixel_norm: How uint8 pixels are normalised, see `tubelets`.
    init_std, scale_init_by_depth: See `transformer.Block`.
    remat, drop_path_rate: See `transformer.Transformer`.
    attention: Attention kernel, see `attention.attend`.
    dtype: Compute dtype; parameters are float32.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  tubelet: tuple[int, int, int] = (2, 16, 16)
  positions: str = 'sincos'
  pixel_norm: str = 'imagenet'
  init_std: float = 0.02
  scale_init_by_depth: bool = False
  remat: str = 'none'
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  drop_path_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    video: jnp.ndarray,
    ids: jnp.ndarray | tuple[jnp.ndarray, ...] | None = None,
    layers: tuple[int, ...] | None = None,
  ) -> jnp.ndarray | tuple[jnp.ndarray, ...]:
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

    Returns:
      Features `[B, K, width]` in the compute dtype, after the final LayerNorm;
      a tuple for a tuple of ids; with `layers` `[B, len(layers), K, width]`.

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
    check_pixel_norm(self.pixel_norm)
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
    x = tub.TubeletEmbed(self.width, self.init_std, self.dtype, name='embed')(x)
    x, rope = encode_positions(
      x, packed_ids, grid, self.positions, self.width // self.num_heads
    )
    x = transformer.Transformer(
      self.depth,
      self.num_heads,
      self.mlp_dim,
      self.init_std,
      self.scale_init_by_depth,
      self.remat,
      self.attention,
      self.dtype,
      self.drop_path_rate,
      name='transformer',
    )(x, rope, lengths, layers)
    x = transformer.LayerNorm(self.dtype, name='norm')(x)
    return tub.unpack(x, lengths) if isinstance(ids, tuple) else x
