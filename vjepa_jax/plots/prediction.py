"""Pictures of predictions: errors, features, neighbours, imagined frames."""

from collections.abc import Mapping, Sequence

import cv2
from etils import epath
from matplotlib import figure
import numpy as np
from PIL import Image

from vjepa_jax.data.encode import write_video
from vjepa_jax.plots.figures import choose_steps, save, show_heat, show_rows


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
  clips = {}
  pairs = zip(videos[:6, ::stride], decoded[:6, ::stride], strict=True)
  for i, (clip, made) in enumerate(pairs):
    clips |= {f'clip {i}': clip, f'decoded {i}': made}
  draw_strip(path, clips)


def draw_prediction(
  path: epath.PathLike,
  *,
  video: np.ndarray,
  errors: np.ndarray,
  colours: Mapping[str, np.ndarray],
  frames: Mapping[str, np.ndarray],
  title: str,
) -> None:
  """Draws a prediction over the frames of its clip, to a PNG.

  Args:
    path: PNG to write.
    video: uint8 `[frames, h, w, 3]`.
    errors: Of each token, `[T, H, W]`, NaN where it was visible.
    colours: Features as colours by name, `[T, H, W, 3]`, 0..1.
    frames: More clips by name, `[frames, h, w, 3]`, 0..255.
    title: What the picture is of.
  """
  steps = choose_steps(len(errors), 8)
  stride = len(video) // len(errors)
  middle = steps * stride + stride // 2
  sides = video.shape[1] // errors.shape[1], video.shape[2] // errors.shape[2]
  hidden = np.kron(~np.isnan(errors[steps]), np.ones((1, *sides)))[..., None]
  shown = video[middle]
  rows = {
    'clip': shown,
    'visible': np.where(hidden, 128, shown),
    'error': shown.mean(axis=-1),
    **{name: x[steps] for name, x in colours.items()},
    **{name: np.asarray(x)[middle] for name, x in frames.items()},
  }
  size = 2.4 + 1.5 * len(steps), 0.7 + 1.6 * len(rows)
  fig = figure.Figure(figsize=size, layout='constrained')
  fig.suptitle(title, fontsize=9)
  axes = show_rows(fig, rows.items(), [[f'frame {i}' for i in middle]])
  for axis, step in zip(axes[2], steps, strict=True):
    heat = show_heat(axis, errors[step], np.nanmax(errors))
  fig.colorbar(heat, ax=list(axes[2]), shrink=0.8, label='mean |error|')
  save(fig, path)


def draw_neighbours(
  path: epath.PathLike,
  *,
  actual: np.ndarray,
  names: Sequence[str],
  found: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
  """Draws real frames whose features are nearest to those of hidden steps.

  Args:
    path: PNG to write.
    actual: The frames that were hidden, uint8 `[S, h, w, 3]`.
    names: Of each.
    found: By what was looked for: frames `[S, k, h, w, 3]`, and their
      similarities `[S, k]`.
  """
  rows = [(name, [image]) for name, image in zip(names, actual, strict=True)]
  titles = [[''] for _ in names]
  titles[0] = ['actual']
  for kind, (frames, similarities) in found.items():
    for i, (_, images) in enumerate(rows):
      images += list(frames[i])
      values = [f'{x:.2f}' for x in similarities[i]]
      titles[i] += values if i else [f'{kind}\n{values[0]}', *values[1:]]
  size = 1.2 * len(rows[0][1]), 1.5 * len(rows) + 0.6
  fig = figure.Figure(figsize=size, layout='constrained')
  show_rows(fig, rows, titles)
  fig.suptitle('nearest real frames in feature space, by cosine', fontsize=9)
  save(fig, path)


def draw_strip(
  path: epath.PathLike, clips: Mapping[str, np.ndarray], most: int = 16
) -> None:
  """Draws clips `[frames, h, w, 3]`, 0..255, under each other to a PNG."""
  steps = choose_steps(max(map(len, clips.values())), most)
  size = 1 + 1.0 * len(steps), 1.1 * len(clips) + 0.3
  fig = figure.Figure(figsize=size, layout='constrained')
  rows = (
    (name, [clip[i] if i < len(clip) else None for i in steps])
    for name, clip in clips.items()
  )
  show_rows(fig, rows, [steps])
  save(fig, path)


def write_side_by_side(
  path: epath.Path, clips: Mapping[str, np.ndarray], fps: float
) -> None:
  """Writes clips side by side, under their names, as GIF and as MP4.

  Args:
    path: Where to write, without suffix.
    clips: By name `[frames, h, w, 3]`, 0..255; one that is shorter ends grey.
    fps: Frames a second.
  """
  length = max(map(len, clips.values()))
  height, width = next(iter(clips.values())).shape[1:3]
  # Both even, as video wants it, and large enough for a caption.
  scale = -(-192 // max(height, width))
  size = 2 * -(-width * scale // 2), 2 * -(-height * scale // 2)
  shape = length, size[1] + 24, len(clips) * (size[0] + 8), 3
  film = np.full(shape, 255, np.uint8)
  for i, (name, clip) in enumerate(clips.items()):
    left = i * (size[0] + 8) + 4
    views = np.full((length, height, width, 3), 128, np.uint8)
    views[: len(clip)] = np.clip(np.round(clip), 0, 255)
    for panel, view in zip(film, views, strict=True):
      view = cv2.resize(view, size, interpolation=cv2.INTER_NEAREST)
      panel[24:, left : left + size[0]] = view
      cv2.putText(
        panel, name, (left, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, 16
      )
  write_video(f'{path}.mp4', film, max(1, round(fps)))
  images = [Image.fromarray(frame) for frame in film]
  images[0].save(
    f'{path}.gif',
    save_all=True,
    append_images=images[1:],
    duration=max(20, round(1000 / fps)),
    loop=0,
  )
