"""Pictures of predictions: errors, features, neighbours, imagined frames."""

from collections.abc import Mapping, Sequence

import cv2
from etils import epath
from matplotlib import figure
import numpy as np
from PIL import Image

from vjepa_jax.data.encode import write_video

Grid = tuple[int, int, int]


def _save(fig: figure.Figure, path: epath.PathLike) -> None:
  with epath.Path(path).open('wb') as file:
    fig.savefig(file, format='png', dpi=90)


def _show(axis, image: np.ndarray, title: str = '', **options) -> None:
  """Shows an image `[H, W, 3]`; floats are 0..255 as uint8 is."""
  if image.ndim == 3 and image.max() > 1.0:
    image = image / 255.0
  axis.imshow(image, interpolation='nearest', **options)
  axis.set_xticks([])
  axis.set_yticks([])
  if title:
    axis.set_title(title, fontsize=8)


def draw_reconstructions(
  path: epath.PathLike, videos: np.ndarray, decoded: np.ndarray, stride: int
) -> None:
  """Draws clips over what was decoded from their features, to a PNG.

  Args:
    path: PNG to write.
    videos: uint8 `[n, frames, h, w, 3]`, of which six are shown.
    decoded: The same, float, 0..255.
    stride: Every so many frames are shown.
  """
  count = min(6, len(videos))
  columns = videos[:, ::stride].shape[1]
  fig = figure.Figure(figsize=(2 + 1.3 * columns, 2.6 * count), layout='tight')
  axes = fig.subplots(2 * count, columns, squeeze=False)
  for i in range(count):
    for row, (name, clips) in enumerate(
      (('clip', videos), ('decoded', decoded))
    ):
      for axis, image in zip(
        axes[2 * i + row], clips[i, ::stride], strict=True
      ):
        _show(axis, image)
      axes[2 * i + row][0].set_ylabel(name, fontsize=8)
  _save(fig, path)
