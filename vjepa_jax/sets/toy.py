"""Toy videos: rendered textures that move, written as real encoded files.

For tests and smoke runs, where nothing can be downloaded.
"""

from pathlib import Path

import numpy as np

from vjepa_jax.data.encode import write_video
from vjepa_jax.sets import writing

# Pixels a frame, (down, right), by label.
_DIRECTIONS = (
  (0, 1),
  (0, -1),
  (1, 0),
  (-1, 0),
  (1, 1),
  (-1, -1),
  (1, -1),
  (-1, 1),
)


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


def write_toy_videos(
  folder: str | Path,
  num_videos: int,
  *,
  seed: int = 0,
  frames: int = 24,
  size: tuple[int, int] = (64, 80),
  fps: int = 10,
  classes: int = 4,
) -> Path:
  """Writes videos of a texture that moves; the direction is the label.

  Args:
    folder: Where `0000.mp4` ... and `manifest.csv` go.
    num_videos: Number of videos; labels take turns.
    seed: The videos are a pure function of it.
    frames: Frames a video.
    size: Height and width, pixels, even.
    fps: Frames a second.
    classes: Number of directions, at most 8.

  Returns:
    The manifest, lines of `file label`.

  Raises:
    ValueError: More classes than directions, or the folder holds another set.
  """
  if classes > len(_DIRECTIONS):
    raise ValueError(
      f'{classes} classes asked for, there are {len(_DIRECTIONS)} directions'
    )
  folder = Path(folder)
  options = {
    'num_videos': num_videos,
    'seed': seed,
    'frames': frames,
    'size': size,
    'fps': fps,
    'classes': classes,
  }
  writing.write_once(
    folder / 'toy.json', options, lambda: _write_videos(folder, **options)
  )
  return folder / 'manifest.csv'


def _write_videos(folder, num_videos, seed, frames, size, fps, classes):
  height, width = size
  lines = []
  for i in range(num_videos):
    rng = np.random.default_rng((seed, i))
    label = i % classes
    texture = _render_texture(rng, height + 2 * frames, width + 2 * frames)
    down, right = _DIRECTIONS[label]
    clip = []
    for t in range(frames):
      # Centred in time, so that the place in the texture tells nothing.
      shift = t - frames // 2
      # What moves right shows ever more of the texture's left.
      top, left = frames - down * shift, frames - right * shift
      clip.append(texture[top : top + height, left : left + width])
    name = f'{i:04d}.mp4'
    write_video(folder / name, np.stack(clip), fps)
    lines.append(f'{name} {label}\n')
  (folder / 'manifest.csv').write_text(''.join(lines))
