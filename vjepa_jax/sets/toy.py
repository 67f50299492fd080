"""Toy videos: rendered textures that move, written as real encoded files.

For tests and smoke runs, where nothing can be downloaded.
"""

from pathlib import Path

import numpy as np

from vjepa_jax.data.encode import write_video
from vjepa_jax.sets import writing

_FPS = 10
# Pixels a frame, (down, right), by label.
_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def write_toy_videos(
  folder: str | Path,
  num_videos: int,
  *,
  seed: int = 0,
  frames: int = 24,
  size: tuple[int, int] = (64, 80),
) -> Path:
  """Writes videos of a texture that moves; the direction is the label.

  Args:
    folder: Where `0000.mp4` ..., `manifest.csv` and, last, `toy.json` go.
    num_videos: Number of videos; labels take turns.
    seed: The videos are a pure function of it.
    frames: Frames a video.
    size: Height and width, pixels, even.

  Returns:
    The manifest, lines of `file label`.

  Raises:
    UserError: The folder holds another set.
  """
  folder = Path(folder)
  names = [f'{i:04d}.mp4' for i in range(num_videos)]
  labels = [i % len(_DIRECTIONS) for i in range(num_videos)]

  def write():
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
      clip = _render(np.random.default_rng((seed, i)), label, frames, *size)
      write_video(folder / name, clip, _FPS)
    writing.write_manifest(folder / 'manifest.csv', names, labels)

  options = {'videos': num_videos, 'seed': seed, 'frames': frames, 'size': size}
  writing.write_once(folder / 'toy.json', options, write)
  return folder / 'manifest.csv'


def _render(
  rng: np.random.Generator, label: int, frames: int, height: int, width: int
) -> np.ndarray:
  """Renders a moving texture, uint8 `[frames, height, width, 3]`."""
  texture = _render_texture(rng, height + 2 * frames, width + 2 * frames)
  down, right = _DIRECTIONS[label]
  clip = []
  # Centred in time, so that the place in the texture tells nothing.
  for shift in range(-(frames // 2), frames - frames // 2):
    # What moves right shows ever more of the texture's left.
    top, left = frames - down * shift, frames - right * shift
    clip.append(texture[top : top + height, left : left + width])
  return np.stack(clip)


def _render_texture(
  rng: np.random.Generator, height: int, width: int
) -> np.ndarray:
  """Draws overlapping rectangles of all sizes: uint8 `[height, width, 3]`."""
  image = np.full((height, width, 3), 128, np.uint8)
  for side in np.geomspace(max(height, width) / 2, 4, 60).astype(int):
    for _ in range(4):
      top, left = rng.integers(-side, height), rng.integers(-side, width)
      h, w = rng.integers(side // 2, side + 1, size=2)
      rows = slice(max(top, 0), max(top + h, 0))
      columns = slice(max(left, 0), max(left + w, 0))
      image[rows, columns] = rng.integers(0, 256, 3)
  return image
