"""What several pictures do: show an image, choose frames, write a file."""

from etils import epath
from matplotlib import figure
import numpy as np


def save(fig: figure.Figure, path: epath.PathLike, dpi: int = 90) -> None:
  """Writes a figure to a PNG."""
  with epath.Path(path).open('wb') as file:
    fig.savefig(file, format='png', dpi=dpi)


def show(
  axis, image: np.ndarray, *, title: str = '', label: str = '', **options
) -> None:
  """Shows an image `[H, W, 3]` with a title above and a label on the left.

  uint8, and floats with values above 1, are 0..255; other floats are 0..1.
  """
  if image.ndim == 3 and image.max() > 1:
    image = np.clip(image / 255.0, 0.0, 1.0)
  axis.imshow(image, interpolation='nearest', **options)
  axis.set_xticks([])
  axis.set_yticks([])
  if title:
    axis.set_title(title, fontsize=8)
  if label:
    axis.set_ylabel(label, fontsize=8)


def show_heat(axis, values: np.ndarray, shape: tuple[int, ...], **options):
  """Lays values of cells `[H, W]` over an image of `shape`; returns the heat.

  Args:
    axis: Where the image is.
    values: Of each cell; NaN is left clear.
    shape: Height and width of the image, and more.
    **options: Of `imshow`.
  """
  height, width = shape[:2]
  extent = (-0.5, width - 0.5, height - 0.5, -0.5)
  return axis.imshow(values, extent=extent, cmap='inferno', vmin=0, **options)


def choose_steps(count: int, most: int) -> np.ndarray:
  """Chooses at most `most` of `count` things, evenly, ends included."""
  return np.unique(
    np.linspace(0, count - 1, min(count, most)).round().astype(int)
  )
