"""What pictures share: rows of images, heat over them, the file."""

from collections.abc import Iterable, Sequence
import io
from typing import Any

from etils import epath
from matplotlib import figure
import numpy as np

from vjepa_jax.data import storage


def save(fig: figure.Figure, path: epath.PathLike, dpi: int = 90) -> None:
  """Writes a figure to a PNG."""
  buffer = io.BytesIO()
  fig.savefig(buffer, format='png', dpi=dpi)
  storage.replace(path, buffer.getvalue())


def show_rows(
  fig: figure.FigureBase,
  rows: Iterable[tuple[str, Sequence[np.ndarray | None]]],
  titles: Sequence[Sequence[str]] = (),
) -> np.ndarray:
  """Fills a figure, or a part of one, with rows of images.

  Args:
    fig: Where they go.
    rows: For each its label and its images, `[h, w]` or `[h, w, 3]`. uint8, and
      floats with values above 1, are 0..255; other floats are 0..1. None leaves
      a place empty.
    titles: Of the images of the first rows.

  Returns:
    The axes, `[rows, columns]`.
  """
  rows = list(rows)
  columns = max(len(images) for _, images in rows)
  axes = fig.subplots(len(rows), columns, squeeze=False)
  for row, (label, images) in zip(axes, rows, strict=True):
    for axis, image in zip(row, images, strict=True):
      if image is None:
        axis.set_axis_off()
        continue
      if image.ndim == 3 and image.max() > 1:
        image = np.clip(image / 255.0, 0.0, 1.0)
      axis.imshow(image, interpolation='nearest', cmap='gray')
      axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(label, fontsize=8)
  for row, texts in zip(axes, titles, strict=False):
    for axis, title in zip(row, texts, strict=True):
      axis.set_title(title, fontsize=8)
  return axes


def show_heat(axis: Any, values: np.ndarray, most: float) -> Any:
  """Lays values of cells `[H, W]`, 0..`most`, over an image; NaN is clear."""
  return axis.imshow(
    values,
    extent=axis.images[0].get_extent(),
    cmap='inferno',
    alpha=0.65,
    vmin=0,
    vmax=most,
  )


def choose_steps(count: int, most: int) -> np.ndarray:
  """Chooses at most `most` of `count` things, evenly, ends included."""
  return np.unique(
    np.linspace(0, count - 1, min(count, most)).round().astype(int)
  )
