"""Positions of tubelets in space and time: fixed sincos tables and 3-D RoPE.

Token ids are in raster order over (t, h, w) of the tubelet grid. The sincos
table is made for the grid at hand, so an encoder takes clips of any length and
resolution without interpolating a stored table. RoPE takes coordinates: those
of token ids on the grid, or any others.
"""

import math

import jax.numpy as jnp
import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.models.options import check_choice

Grid = tuple[int, int, int]
Rope = tuple[jnp.ndarray, jnp.ndarray]

ROPE_STYLES = ('tiled', 'interleaved')
POSITIONS = (
  'sincos',
  *(f'rope_{style}' for style in ROPE_STYLES),
  'rope_rescaled',
)
# Height and width go from 0 to it in 'rope_rescaled': those of 256 pixels.
_EXTENT = 15.0


def make_sincos_table(grid: Grid, dim: int) -> np.ndarray:
  """Makes the fixed 3-D position table of V-JEPA 1.

  Each axis, in the order t, h, w, has `ceil(dim / 6)` sines and then as many
  cosines; what is more than `dim` is cut off.

  Args:
    grid: Number of tubelets in (time, height, width).
    dim: Feature width, even.

  Returns:
    float32 `[T * H * W, dim]`.
  """
  half = math.ceil(dim / 6)
  omega = 10000.0 ** -(np.arange(half) / half)
  angles = np.indices(grid).reshape(3, -1, 1) * omega  # [3, N, half]
  parts = [f(axis) for axis in angles for f in (np.sin, np.cos)]
  return np.concatenate(parts, axis=1)[:, :dim].astype(np.float32)


def compute_coordinates(ids: jnp.ndarray, grid: Grid) -> jnp.ndarray:
  """Computes where tokens are, in units of one tubelet.

  Args:
    ids: int32 `[...]`, raster order over (t, h, w). Time has no end: ids
      beyond the grid are those of frames after it.
    grid: Number of tubelets in (time, height, width) that `ids` refer to.

  Returns:
    float32 `[..., 3]`: t, h and w.
  """
  _, height, width = grid
  frame = height * width
  coordinates = ids // frame, ids % frame // width, ids % width
  return jnp.stack(coordinates, axis=-1).astype(jnp.float32)


def rescale(coordinates: jnp.ndarray, grid: Grid) -> jnp.ndarray:
  """Stretches h and w of coordinates `[..., 3]` on a grid to [0, 15]."""
  _, height, width = grid
  scale = (1.0, *(_EXTENT / max(n - 1, 1) for n in (height, width)))
  return coordinates * jnp.asarray(scale, jnp.float32)


def make_rope_tables(
  coordinates: jnp.ndarray, head_dim: int, style: str
) -> Rope:
  """Makes the cosine and sine tables of 3-D RoPE for the given tokens.

  A head's channels are split as [t | h | w | rest], each axis taking
  `2 * (head_dim // 3 // 2)` of them; the rest is not rotated.

  In style 'tiled' the frequencies of an axis are laid out [f0..fn, f0..fn]
  while the rotation pairs channels (2i, 2i + 1), so that the two members of a
  pair turn by different angles. It is no rotation, but it is what the released
  V-JEPA 2 weights were trained with. 'interleaved' gives both members of a
  pair the same frequency: the exact rotation.

  Args:
    coordinates: float32 `[B, N, 3]`, (t, h, w) of each token; on the tubelet
      grid those of `compute_coordinates`.
    head_dim: Channels of one attention head, even, at least 6.
    style: 'tiled' or 'interleaved'.

  Returns:
    Two float32 arrays `[B, N, head_dim]`: cosines and sines.
  """
  check_choice('RoPE style', style, ROPE_STYLES)
  axis_dim = 2 * (head_dim // 3 // 2)
  half = axis_dim // 2
  omega = jnp.asarray(10000.0 ** -(np.arange(half) / half), dtype=jnp.float32)
  angles = coordinates[..., None] * omega  # [B, N, 3, half]
  if style == 'tiled':
    angles = jnp.concatenate([angles, angles], axis=-1)
  else:
    angles = jnp.repeat(angles, 2, axis=-1)
  angles = angles.reshape(*angles.shape[:-2], -1)  # [B, N, 3 * axis_dim]
  rest = [(0, 0)] * (angles.ndim - 1) + [(0, head_dim - angles.shape[-1])]
  angles = jnp.pad(angles, rest)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jnp.ndarray, tables: Rope) -> jnp.ndarray:
  """Rotates channel pairs (2i, 2i + 1) of queries or keys, in float32.

  Args:
    x: `[B, heads, N, head_dim]`; so is what is returned, in its dtype.
    tables: What `make_rope_tables` returned, each `[B, N, head_dim]`.
  """
  cos, sin = (table[:, None] for table in tables)  # [B, 1, N, head_dim]
  # (a, b) -> (-b, a) for each pair, as a product with a matrix of signs. It is
  # exact, and on a TPU much cheaper than moving single lanes.
  swap = np.kron(np.eye(x.shape[-1] // 2), [[0.0, 1.0], [-1.0, 0.0]])
  partner = jnp.einsum(
    'bhnc,cd->bhnd',
    x,
    jnp.asarray(swap, x.dtype),
    precision='highest',
    preferred_element_type=jnp.float32,
  )
  return (x.astype(jnp.float32) * cos + partner * sin).astype(x.dtype)


def encode_positions(
  x: jnp.ndarray,
  ids: jnp.ndarray,
  grid: Grid,
  positions: str,
  head_dim: int,
  coordinates: jnp.ndarray | None = None,
) -> tuple[jnp.ndarray, Rope | None]:
  """Adds sincos positions to tokens, or makes the tables of RoPE.

  Args:
    x: Tokens `[B, K, D]`.
    ids: Their ids, int32 `[B, K]`, raster order over (t, h, w); `[1, K]` where
      all clips have the same.
    grid: Tubelet grid that the ids refer to.
    positions: One of `POSITIONS`.
    head_dim: Channels of one attention head.
    coordinates: float32 `[N, 3]`, (t, h, w) of the token of each id; None for
      those of the grid. RoPE only.

  Returns:
    The tokens, and the rope argument of the transformer (None for sincos).
  """
  if positions == 'sincos':
    if coordinates is not None:
      raise UserError("positions 'sincos' have no coordinates: take RoPE")
    table = jnp.asarray(make_sincos_table(grid, x.shape[-1]), x.dtype)
    return x + table[ids], None
  if coordinates is None:
    places = compute_coordinates(ids, grid)
  else:
    places = coordinates[ids]
  style = positions.removeprefix('rope_')
  if style == 'rescaled':
    style = 'interleaved'
    if coordinates is None:
      places = rescale(places, grid)
  return x, make_rope_tables(places, head_dim, style)
