"""Surprise over time, drawn over the frames that it is about."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from etils import epath
from matplotlib import figure
import numpy as np

from vjepa_jax.plots.figures import save

_NUM_SHOWN = 12


class Panel(NamedTuple):
  """Films that are drawn together."""

  title: str
  # By name, frames uint8 [T, H, W, 3] and surprise [W].
  films: Mapping[str, tuple[np.ndarray, np.ndarray]]
  violation: float | None  # frame that is marked


def draw_surprise(
  path: epath.PathLike,
  panels: Sequence[Panel],
  centre: Callable[[int], np.ndarray],
) -> None:
  """Draws panels of curves with the frames below to a PNG.

  Args:
    path: PNG to write.
    panels: What to draw.
    centre: From the number of frames to where each window's surprise is drawn,
      in frames `[W]`.
  """
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  most = max(len(panel.films) for panel in panels)
  size = 8 * columns, (2.2 + 0.8 * most) * rows
  fig = figure.Figure(figsize=size, layout='constrained')
  parts = fig.subfigures(rows, columns, squeeze=False).flat
  for part, panel in zip(parts, panels, strict=False):
    _draw_panel(part, panel, centre)
  save(fig, path, dpi=80)


def _draw_panel(part, panel, centre):
  ratios = [2.2] + [0.8] * len(panel.films)
  axes = part.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
  top, *strips = axes
  top.set_title(panel.title, fontsize=10)
  top.set_ylabel('surprise', fontsize=8)
  top.grid(alpha=0.3)
  for axis, (name, (film, curve)) in zip(
    strips, panel.films.items(), strict=True
  ):
    top.plot(centre(len(film)), curve, marker='.', label=name)
    # Each frame that is shown stands in the middle of its time.
    length = len(film) / _NUM_SHOWN
    shown = (np.arange(_NUM_SHOWN) + 0.5) * length
    strip = np.concatenate(film[shown.astype(int)], axis=1)
    extent = (-0.5, len(film) - 0.5, 0, 1)
    axis.imshow(strip, extent=extent, aspect='auto', interpolation='nearest')
    axis.set_yticks([])
    axis.set_ylabel(name, fontsize=8)
  if panel.violation is not None:
    for axis in axes:
      axis.axvline(panel.violation - 0.5, color='red', linestyle='--')
    top.plot([], [], 'r--', label='violation shows')
  top.legend(fontsize=8)
  axes[-1].set_xlabel('frame; surprise stands in the middle of what it is of')
