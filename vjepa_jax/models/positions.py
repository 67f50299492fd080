"""Positions of tubelets in space and time: fixed sincos tables and 3-D RoPE.

Token ids are in raster order over (t, h, w) of the tubelet grid. The tables are
made for the grid at hand, so an encoder takes clips of any length and
resolution without interpolating a stored table.
"""

import math

import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int, int]

ROPE_STYLES = ('tiled', 'interleaved')


def _sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
  """Returns `[sin | cos]` features, float64 `[N, dim]`, of positions `[N]`."""
  omega = 10000.0 ** -(np.arange(dim // 2) / (dim / 2.0))
  angles = positions[:, None] * omega[None]  # [N, dim / 2]
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _grid_coordinates(grid: Grid) -> list[np.ndarray]:
  """Returns the t, h and w coordinate of every token, each float64 `[N]`."""
  axes = np.meshgrid(
    *(np.arange(n, dtype=np.float64) for n in grid), indexing='ij'
  )
  return [axis.reshape(-1) for axis in axes]


def make_sincos_table(
  grid: Grid, dim: int, uniform_power: bool = True
) -> np.ndarray:
  """Makes the fixed 3-D position table of V-JEPA 1.

  Args:
    grid: Number of tubelets in (time, height, width).
    dim: Feature width, even (a multiple of 8 without `uniform_power`).
    uniform_power: Give t, h and w the same `2 * ceil(dim / 6)` features and
      cut the concatenation to `dim` (every published config). Otherwise time
      has half of the features and h and w a quarter each.

  Returns:
    float32 `[T * H * W, dim]`, features in the order t, h, w.
  """
  if uniform_power:
    dims = [2 * math.ceil(dim / 6)] * 3
  else:
    dims = [dim // 2, dim // 4, dim // 4]
  parts = [
    _sincos_1d(coordinate, d)
    for coordinate, d in zip(_grid_coordinates(grid), dims, strict=True)
  ]
  return np.concatenate(parts, axis=1)[:, :dim].astype(np.float32)


def make_rope_tables(
  ids: jnp.ndarray, grid: Grid, head_dim: int, style: str
) -> tuple[jnp.ndarray, jnp.ndarray]:
  """Makes the cosine and sine tables of 3-D RoPE for the given tokens.

  A head's channels are split as [t | h | w | rest], each axis taking
  `2 * (head_dim // 3 // 2)` of them; the rest is not rotated.

  In style 'tiled' the frequencies of an axis are laid out [f0..fn, f0..fn]
  while the rotation pairs channels (2i, 2i + 1), so that the two members of a
  pair turn by different angles. It is no rotation, but it is what the released
  V-JEPA 2 weights were trained with. 'interleaved' gives both members of a
  pair the same frequency: the exact rotation.

  Args:
    ids: int32 `[B, N]`, token ids in raster order over (t, h, w).
    grid: Number of tubelets in (time, height, width) that `ids` refer to.
    head_dim: Channels of one attention head, at least 6.
    style: 'tiled' or 'interleaved'.

  Returns:
    Two float32 arrays `[B, N, head_dim]`: cosines and sines.
  """
  if style not in ROPE_STYLES:
    raise ValueError(f'RoPE style {style!r} is not one of {ROPE_STYLES}')
  _, height, width = grid
  frame = height * width
  axis_dim = 2 * (head_dim // 3 // 2)
  half = axis_dim // 2
  omega = jnp.asarray(10000.0 ** -(np.arange(half) / half), dtype=jnp.float32)
  coordinates = (ids // frame, ids % frame // width, ids % width)
  angles = []
  for coordinate in coordinates:
    angle = coordinate.astype(jnp.float32)[..., None] * omega  # [B, N, half]
    if style == 'tiled':
      angles.append(jnp.concatenate([angle, angle], axis=-1))
    else:
      angles.append(jnp.repeat(angle, 2, axis=-1))
  rest = jnp.zeros((*ids.shape, head_dim - 3 * axis_dim), jnp.float32)
  angles = jnp.concatenate([*angles, rest], axis=-1)  # [B, N, head_dim]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: jnp.ndarray, tables: tuple[jnp.ndarray, jnp.ndarray]
) -> jnp.ndarray:
  """Rotates channel pairs (2i, 2i + 1) of queries or keys.

  Args:
    x: `[B, heads, N, head_dim]`.
    tables: What `make_rope_tables` returned, each `[B, N, head_dim]`.

  Returns:
    The same shape and dtype as `x`; the rotation is done in float32.
  """
  cos, sin = (table[:, None] for table in tables)  # [B, 1, N, head_dim]
  # (a, b) -> (-b, a) for each pair, as a product with a matrix of signs. It is
  # exact, and on a TPU much cheaper than moving single lanes.
  partner = jnp.einsum(
    'bhnc,cd->bhnd',
    x,
    jnp.asarray(_make_pair_swap(x.shape[-1]), x.dtype),
    precision='highest',
    preferred_element_type=jnp.float32,
  )
  return (x.astype(jnp.float32) * cos + partner * sin).astype(x.dtype)


def _make_pair_swap(dim: int) -> np.ndarray:
  """Returns the matrix `[dim, dim]` that maps each pair (a, b) to (-b, a)."""
  swap = np.zeros((dim, dim), np.float32)
  even = np.arange(0, dim - 1, 2)
  swap[even + 1, even] = -1.0
  swap[even, even + 1] = 1.0
  return swap
