"""The motion set: labelled clips cut from real videos.

A clip is a 36-pixel window drifting over one frame of a source video, and its
label is the direction in which the picture moves, one of eight. The window also
trembles like a hand-held camera: from frame to frame it is off its path by one
pixel, so that two frames say little about the drift and sixteen say it all.

What a clip shows says nothing of its label: source video, moment, place,
orientation (uniform over the circle), size and colour are drawn from the same
distributions for all classes, and every class must stay inside the same
circle around its middle. Training and test clips come from different videos.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
import pathlib
import threading

import av
import cv2
import numpy as np

from vjepa_jax.data.encode import write_video
from vjepa_jax.errors import UserError
from vjepa_jax.sets import writing

av.logging.set_libav_level(av.logging.PANIC)

# Where the picture goes, clockwise on a screen from the right.
CLASSES = (
  *('right', 'down right', 'down', 'down left'),
  *('left', 'up left', 'up', 'up right'),
)

# A change of these numbers changes the set: raise the version with them.
_VERSION = 3
_SIZE = 36
_FRAMES = 16
_FPS = 8
_DRIFT = (1.6, 2.4)  # pixels a frame
_TREMBLE = 1.0  # pixels, standard deviation along each axis
# Half the side of the picture that any class may touch, in window pixels.
_REACH = (
  math.hypot(_SIZE, _SIZE) / 2 + _DRIFT[1] * (_FRAMES - 1) / 2 + 3 * _TREMBLE
)
# Sources are shrunk to this short side, and read up to this many frames: one
# video takes at most about 300 MB of memory.
_SHORT_SIDE = 240
_MAX_FRAMES = 1000
_MIN_TEXTURE = 30.0
_MAX_DRAWS = 200


def write_motion_set(
  folder: pathlib.Path | str,
  videos: Sequence[pathlib.Path | str],
  *,
  num_train: int = 4000,
  num_test: int = 800,
  seed: int = 0,
) -> pathlib.Path:
  """Writes the labelled clips, their manifests and their description.

  Writes `train/*.mp4`, `test/*.mp4`, `train.csv`, `test.csv` (a line
  `relative/path label` a clip) and, last, `motion.json`: a folder that has it
  is finished and, when the options agree, is left alone.

  Args:
    folder: Where to write.
    videos: At least two video files; test clips are cut from a third of them,
      drawn by the seed, and training clips from the others.
    num_train: Training clips.
    num_test: Test clips.
    seed: The same seed, videos and options give the same clips.

  Returns:
    `folder`.

  Raises:
    UserError: There are too few videos, one cannot be used, or `folder` holds
      a finished set with other options.
  """
  folder = pathlib.Path(folder)
  videos = sorted({pathlib.Path(v).resolve() for v in videos})
  if len(videos) < 2:
    raise UserError(
      f'a motion set needs at least 2 videos, got {len(videos)}: one to train '
      'and one to test'
    )
  order = np.random.default_rng(seed).permutation(len(videos))
  test = sorted(videos[i] for i in order[: max(1, len(videos) // 3)])
  train = [v for v in videos if v not in test]
  options = {
    'version': _VERSION,
    'classes': list(CLASSES),
    'size': _SIZE,
    'frames': _FRAMES,
    'fps': _FPS,
    'pixels_per_frame': list(_DRIFT),
    'tremble_pixels': _TREMBLE,
    'seed': seed,
    'num_train': num_train,
    'num_test': num_test,
    'videos': {
      'train': [video.name for video in train],
      'test': [video.name for video in test],
    },
    'video_bytes': sum(video.stat().st_size for video in videos),
  }

  def write():
    _write_split(folder, 'train', num_train, train, (seed, 0))
    _write_split(folder, 'test', num_test, test, (seed, 1))

  writing.write_once(folder / 'motion.json', options, write)
  return folder


def _write_split(folder, split, num_clips, videos, seed):
  """Writes the clips of one split, video by video, and its manifest."""
  writing.clear_split(folder, split)
  names = [f'{split}/{i:05d}.mp4' for i in range(num_clips)]
  labels = [i % len(CLASSES) for i in range(num_clips)]
  lock, read_frames = threading.Lock(), functools.lru_cache(2)(_read_frames)

  def find_video(i):
    # All classes of one video, then all classes of the next: label and source
    # are independent.
    return videos[i // len(CLASSES) % len(videos)]

  def write(i):
    video = find_video(i)
    with lock:
      frames = read_frames(video)
    try:
      clip = render_clip(frames, labels[i], np.random.default_rng((*seed, i)))
    except ValueError as error:
      raise UserError(f'{video}: {error}; leave this video out') from error
    write_video(folder / names[i], clip, _FPS)

  # Few videos at a time fit in memory.
  order = sorted(range(num_clips), key=find_video)
  writing.map_in_threads(write, order, unit=f'{split} clip')
  writing.write_manifest(folder / f'{split}.csv', names, labels)


def _read_frames(path: pathlib.Path) -> list[np.ndarray]:
  """Reads the first frames of a video, small: uint8 [H, W, 3] each."""
  frames = []
  try:
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      stream.thread_count = 1
      scale = min(1, _SHORT_SIDE / min(stream.width, stream.height))
      size = (round(stream.width * scale), round(stream.height * scale))
      for frame in itertools.islice(container.decode(stream), _MAX_FRAMES):
        image = frame.to_ndarray(format='rgb24')
        if scale < 1:
          image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        frames.append(image)
  except (av.FFmpegError, IndexError) as error:
    raise UserError(f'{path}: cannot be read as a video: {error}') from error
  if not frames:
    raise UserError(f'{path}: has no frames')
  return frames


def render_clip(
  frames: Sequence[np.ndarray], label: int, rng: np.random.Generator
) -> np.ndarray:
  """Moves a window over one frame of a video.

  Args:
    frames: uint8 RGB [H, W, 3] each.
    label: Index of the motion in `CLASSES`.
    rng: Draws the window first and the motion after it, so that the same
      generator gives all classes the same window.

  Returns:
    uint8 [16, 36, 36, 3].

  Raises:
    UserError: No frame has texture.
  """
  look = _draw_window(frames, rng)
  angle = 2 * math.pi * label / len(CLASSES)
  drift = rng.uniform(*_DRIFT) * np.array([math.cos(angle), math.sin(angle)])
  times = np.arange(_FRAMES) - (_FRAMES - 1) / 2
  path = times[:, None] * drift + _TREMBLE * rng.standard_normal((_FRAMES, 2))
  return np.stack([look(shift) for shift in path])


def _draw_window(
  frames: Sequence[np.ndarray], rng: np.random.Generator
) -> Callable[[np.ndarray], np.ndarray]:
  """Draws windows until one has texture in both directions.

  The label has no part in this: windows of all classes are alike.

  Returns:
    What the window shows, see `_look`, as a function of the shift.
  """
  height, width = frames[0].shape[:2]
  for _ in range(_MAX_DRAWS):
    picture = frames[int(rng.integers(len(frames)))]
    largest = min(height, width) / 2 / _REACH
    scale = largest * math.exp(rng.uniform(math.log(0.5), 0))
    margin = scale * _REACH
    x = rng.uniform(margin, max(margin, width - margin))
    y = rng.uniform(margin, max(margin, height - margin))
    angle = rng.uniform(0, 2 * math.pi)
    c, s = math.cos(angle), math.sin(angle)
    turn = scale * np.array([[c, -s], [s, c]])
    turn[:, 0] *= rng.choice((-1, 1))
    gain = rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, 3)
    look = functools.partial(
      _look, picture, np.array([x, y]), turn, gain.astype(np.float32)
    )
    if _measure_texture(look(np.zeros(2))) >= _MIN_TEXTURE:
      return look
  raise UserError(f'no textured window in {_MAX_DRAWS} draws')


def _measure_texture(image: np.ndarray) -> float:
  """How well motion can be seen, in squared levels a pixel.

  The smaller eigenvalue of the structure tensor: large only where brightness
  changes along both axes, so that no direction of motion is hidden.
  """
  grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
  dy, dx = np.gradient(grey)
  tensor = [
    [(dx * dx).mean(), (dx * dy).mean()],
    [(dx * dy).mean(), (dy * dy).mean()],
  ]
  return float(np.linalg.eigvalsh(tensor)[0])


def _look(
  picture: np.ndarray,
  centre: np.ndarray,
  base: np.ndarray,
  gain: np.ndarray,
  shift: np.ndarray,
) -> np.ndarray:
  """The view of a shifted picture, uint8 [36, 36, 3].

  Drawn at twice the size and averaged, as windows may be up to three source
  pixels a pixel and would alias.

  Args:
    picture: uint8 [H, W, 3].
    centre: [2] x, y of the window's in pixels of the picture.
    base: [2, 2] from window pixels to those of the picture.
    gain: [3] of the colours.
    shift: [2] of the picture, in window pixels.
  """
  # From pixels of the double picture to centred window pixels, and from there,
  # against the motion, to the source.
  centred = np.array([[0.5, 0, 0.25], [0, 0.5, 0.25]])
  centred[:, 2] -= _SIZE / 2 + shift
  to_source = base @ centred
  to_source[:, 2] += centre - 0.5
  view = cv2.warpAffine(
    picture,
    to_source,
    (2 * _SIZE, 2 * _SIZE),
    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    borderMode=cv2.BORDER_REFLECT_101,
  )
  view = cv2.resize(view, (_SIZE, _SIZE), interpolation=cv2.INTER_AREA)
  return np.clip(view * gain, 0, 255).astype(np.uint8)
