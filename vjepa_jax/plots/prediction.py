"""Pictures of predictions: errors, features, neighbours, imagined frames."""

from collections.abc import Mapping, Sequence
import itertools

import cv2
from etils import epath
from matplotlib import figure
import numpy as np
from PIL import Image

from vjepa_jax.data.encode import write_video
from vjepa_jax.plots.figures import choose_steps, save, show, show_heat


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
  for i, (row, (name, clips)) in itertools.product(
    range(count), enumerate((('clip', videos), ('decoded', decoded)))
  ):
    for j, image in enumerate(clips[i, ::stride]):
      show(axes[2 * i + row, j], image, label='' if j else name)
  save(fig, path)


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
  rows = ['clip', 'visible', 'error', *colours, *frames]
  fig = figure.Figure(
    figsize=(2.4 + 1.5 * len(steps), 0.7 + 1.6 * len(rows)),
    layout='constrained',
  )
  fig.suptitle(title, fontsize=9)
  axes = fig.subplots(len(rows), len(steps), squeeze=False)
  cell = [
    side // n
    for side, n in zip(video.shape[1:3], errors.shape[1:], strict=True)
  ]
  for column, step in enumerate(steps):
    frame = step * stride + stride // 2
    visible = np.isnan(errors[step]).repeat(cell[0], 0).repeat(cell[1], 1)
    images = [
      video[frame],
      np.where(visible[..., None], video[frame], 128),
      video[frame].mean(axis=-1),
      *(values[step] for values in colours.values()),
      *(np.asarray(clip)[frame] for clip in frames.values()),
    ]
    for i, (name, image) in enumerate(zip(rows, images, strict=True)):
      show(
        axes[i, column],
        image,
        title='' if i else f'frame {frame}',
        label='' if column else name,
        cmap='gray',
      )
    heat = show_heat(
      axes[2, column],
      errors[step],
      video.shape[1:],
      alpha=0.7,
      vmax=np.nanmax(errors),
    )
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
  counts = [frames.shape[1] for frames, _ in found.values()]
  columns = 1 + sum(counts)
  fig = figure.Figure(
    figsize=(1.2 * columns, 1.5 * len(actual) + 0.6), layout='constrained'
  )
  axes = fig.subplots(len(actual), columns, squeeze=False)
  for i, row in enumerate(axes):
    show(row[0], actual[i], title='' if i else 'actual', label=names[i])
    first = 1
    for name, (frames, similarities) in found.items():
      for k in range(frames.shape[1]):
        title = f'{similarities[i, k]:.2f}'
        title = f'{name}\n{title}' if not i and not k else title
        show(row[first + k], frames[i, k], title=title)
      first += frames.shape[1]
  fig.suptitle('nearest real frames in feature space, by cosine', fontsize=9)
  save(fig, path)


def draw_strip(
  path: epath.PathLike, clips: Mapping[str, np.ndarray], most: int = 16
) -> None:
  """Draws clips `[frames, h, w, 3]`, 0..255, under each other to a PNG."""
  length = max(map(len, clips.values()))
  steps = choose_steps(length, most)
  fig = figure.Figure(
    figsize=(1 + 1.0 * len(steps), 1.1 * len(clips) + 0.3), layout='constrained'
  )
  axes = fig.subplots(len(clips), len(steps), squeeze=False)
  for i, ((name, clip), row) in enumerate(
    zip(clips.items(), axes, strict=True)
  ):
    for j, (axis, step) in enumerate(zip(row, steps, strict=True)):
      if step < len(clip):
        title = '' if i else str(step)
        show(axis, clip[step], title=title, label='' if j else name)
      else:
        axis.set_axis_off()
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
  film = []
  for t in range(length):
    panels = []
    for name, clip in clips.items():
      panel = np.full((size[1] + 24, size[0] + 8, 3), 255, np.uint8)
      view = np.full((height, width, 3), 128, np.uint8)
      if t < len(clip):
        view = np.clip(np.round(clip[t]), 0, 255).astype(np.uint8)
      view = cv2.resize(view, size, interpolation=cv2.INTER_NEAREST)
      panel[24:, 4:-4] = view
      cv2.putText(
        panel, name, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, 16
      )
      panels.append(panel)
    film.append(np.concatenate(panels, axis=1))
  film = np.stack(film)
  write_video(f'{path}.mp4', film, max(1, round(fps)))
  images = [Image.fromarray(frame) for frame in film]
  images[0].save(
    f'{path}.gif',
    save_all=True,
    append_images=images[1:],
    duration=max(20, round(1000 / fps)),
    loop=0,
  )
