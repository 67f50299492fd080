"""Clips of videos: how they are cut, and many of them in memory."""

from collections.abc import Mapping, Sequence
import concurrent.futures
import dataclasses
from typing import Any

from absl import logging
import numpy as np

from vjepa_jax.data import sampling, transforms
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.records import NO_LABEL, Record
from vjepa_jax.data.video import DecodeError, Limits, Video
from vjepa_jax.errors import UserError
from vjepa_jax.progress import make_bar

# Further videos that cannot be used are counted and not named in the log.
_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class ClipOptions:
  """How clips are cut from a video.

  Attributes:
    frames: Frames of a clip.
    resolution: Height and width of a clip, pixels.
    frame_step: Video frames from one clip frame to the next; or
    fps: clip frames per second. Exactly one of the two.
    num_clips: Clips cut from each video that is opened.
    crop_scale: Range of the random crop's share of the frame.
    crop_aspect_ratio: Range of its width over height.
    flip: Probability of a horizontal flip.
    views: Crops of each clip in evaluation: the centre, or so many squares
      along the long side; in training there is one, at random.
    max_seconds: See `video.Limits`.
    max_gib: See `video.Limits`.
    distinct: Frames that are taken from the video, each repeated until there
      are `frames`; None for all.
  """

  frames: int = 16
  resolution: int = 224
  frame_step: int | None = 4
  fps: float | None = None
  num_clips: int = 1
  crop_scale: tuple[float, float] = (0.3, 1.0)
  crop_aspect_ratio: tuple[float, float] = (0.75, 1.35)
  flip: float = 0.5
  views: int = 1
  max_seconds: float = 60.0
  max_gib: float = 16.0
  distinct: int | None = None

  @property
  def limits(self) -> Limits:
    """What one video may take."""
    return Limits(self.max_seconds, self.max_gib)

  def __post_init__(self):
    if (self.frame_step is None) == (self.fps is None):
      raise UserError(
        'set exactly one of frame_step and fps for clips, got '
        f'frame_step={self.frame_step} and fps={self.fps}'
      )


def adapt_options(
  options: ClipOptions, source: Mapping[str, Any]
) -> ClipOptions:
  """Returns the options for a source with a rate or frames of its own.

  Args:
    options: Of all sources.
    source: Its config. `fps` or `frame_step` take the place of both; `frames`
      are the distinct ones of its clips.

  Raises:
    UserError: They do not fit.
  """
  distinct = source.get('frames') or options.frames
  if options.frames % distinct:
    raise UserError(
      f'{source["path"]}: its frames={distinct} do not divide the '
      f'{options.frames} of a clip'
    )
  own = {k: source[k] for k in ('fps', 'frame_step') if source.get(k)}
  try:
    rate = {'fps': None, 'frame_step': None, **own} if own else {}
    return dataclasses.replace(options, distinct=distinct, **rate)
  except ValueError as e:
    raise UserError(f'{source["path"]}: {e}') from e


@dataclasses.dataclass(frozen=True)
class Clips:
  """Clips in memory and where they are from.

  Attributes:
    videos: uint8 `[N, frames, size, size, 3]`.
    names: Of their videos.
    labels: int64 `[N]`, -1 where a video has none.
    failures: Name and reason of each video that was left out.
  """

  videos: np.ndarray
  names: tuple[str, ...]
  labels: np.ndarray | None = None
  failures: tuple[dict[str, str], ...] = ()


def _cut(
  video: Video,
  options: ClipOptions,
  *,
  start: int = 0,
  num_clips: int = 1,
  views: int = 1,
  rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts clips from the part of an open video that begins at frame `start`.

  Returns:
    As `read_timed_clips`, with frame numbers in place of times.
  """
  indices = start + sampling.sample_frames(
    video.times[start:],
    options.distinct or options.frames,
    frame_step=options.frame_step,
    fps=options.fps,
    num_clips=num_clips,
    rng=rng,
  )
  indices = np.repeat(indices, options.frames // indices.shape[1], axis=1)
  sides, size = (video.height, video.width), (options.resolution,) * 2
  clips = []
  for frames in indices:
    flip = False
    if rng is not None:
      box = transforms.random_resized_crop(
        *sides,
        scale=options.crop_scale,
        aspect_ratio=options.crop_aspect_ratio,
        rng=rng,
      )
      boxes, flip = [box], rng.random() < options.flip
    elif views > 1:
      boxes = transforms.spread_crops(*sides, views)
    else:
      boxes = [transforms.center_crop(*sides)]
    clip = video.read_boxes(frames, boxes, size)
    clips.append(transforms.flip_horizontal(clip) if flip else clip)
  return np.concatenate(clips), indices


def read_timed_clips(
  record: Record,
  options: ClipOptions,
  rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts clips from one video, and says when their frames are shown.

  Args:
    record: The video.
    options: How to cut.
    rng: Decides times, crops and flips (one of each a clip); None takes the
      deterministic times and the centre crop of evaluation.

  Returns:
    Clips uint8 `[num_clips, frames, resolution, resolution, 3]`; in evaluation
    `[num_clips * views, ...]`, the views of a clip one after the other. And
    times float64 `[num_clips, frames]`, in seconds.

  Raises:
    DecodeError: The video cannot be read.
  """
  num_clips, views = options.num_clips, options.views
  with open_video(record.video, options.limits) as video:
    clips, indices = _cut(
      video, options, num_clips=num_clips, views=views, rng=rng
    )
    return clips, video.times[indices]


def read_clips(
  record: Record,
  options: ClipOptions,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """Cuts clips from one video, see `read_timed_clips`."""
  return read_timed_clips(record, options, rng)[0]


def read_from(
  video: str | bytes | np.ndarray, options: ClipOptions, start: float
) -> tuple[np.ndarray, float]:
  """Reads one clip from a moment of a video on, at the centre.

  Args:
    video: See `decode.open_video`.
    options: How it is cut.
    start: Where it begins, in seconds.

  Returns:
    uint8 `[frames, size, size, 3]`, and its frames a second.

  Raises:
    DecodeError: The video cannot be read, or ends before the clip does.
  """
  with open_video(video, options.limits) as opened:
    return _cut_from(opened, options, start)


def read_windows(
  video: str | bytes | np.ndarray, options: ClipOptions, limit: int
) -> Clips:
  """Cuts a video into clips, one after the other; at most `limit` of them.

  Raises:
    DecodeError: The video cannot be read, or is shorter than one clip.
  """
  with open_video(video, options.limits) as opened:
    end = opened.times[-1] + 1.0 / opened.fps
    rate = options.fps or opened.fps / options.frame_step
    seconds = options.frames / rate
    count = max(1, int(end / seconds + 1e-6))
    starts = np.arange(count)[: limit or None] * seconds
    clips = [_cut_from(opened, options, float(start))[0] for start in starts]
  return Clips(np.stack(clips), tuple(f'{start:.1f} s' for start in starts))


def _cut_from(
  video: Video, options: ClipOptions, start: float
) -> tuple[np.ndarray, float]:
  """Cuts as `read_from` from an open video."""
  times = video.times
  interval = times[-1] / (len(times) - 1) if len(times) > 1 else 1.0
  end = times[-1] + interval
  if options.fps:
    seconds = options.frames / options.fps
  else:
    seconds = options.frames * options.frame_step * interval
  if start < 0 or start + seconds > end + 0.5 * interval:
    raise DecodeError(
      f'{options.frames} frames from {start:.2f} s on take {seconds:.2f} s, '
      f'the video has {end:.2f} s'
    )
  first = int(np.searchsorted(times, start - 1e-3))
  clips, _ = _cut(video, options, start=first)
  return clips[0], options.frames / seconds


def load_clips(
  source: Sequence[Record],
  options: ClipOptions,
  *,
  limit: int | None = None,
  num_threads: int = 2,
  whole: bool = False,
  labelled: bool = False,
) -> Clips:
  """Decodes the first clip of each video, at the centre.

  Args:
    source: The videos.
    options: How clips are cut; crops and times are those of evaluation.
    limit: At most so many videos, a fixed random subset: labels often take
      turns in a manifest.
    num_threads: Decoding threads.
    whole: Leave out videos that are shorter than a clip, whose last frame would
      be repeated.
    labelled: Every video must have a label.

  Raises:
    UserError: A label is missing, or no video can be used.
  """
  count = min(len(source), limit or len(source))
  order = np.random.default_rng(0).permutation(len(source))

  def load(index):
    try:
      record = source[int(index)]
    except DecodeError as error:
      return Record('', NO_LABEL, error.name), error
    if labelled and record.label < 0:
      raise UserError(f'{record.name} has no label, a probe needs one')
    try:
      with open_video(record.video, options.limits) as video:
        if whole:
          return record, _cut_from(video, options, 0.0)[0]
        return record, _cut(video, options)[0][0]
    except DecodeError as error:
      return record, error

  loaded, failures = [], []
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    results = pool.map(load, np.sort(order[:count]))
    for record, clip in make_bar(
      results, total=count, unit='clip', leave=False, desc='decoding clips'
    ):
      if isinstance(clip, np.ndarray):
        loaded.append((clip, record.name, record.label))
        continue
      failures.append({'name': record.name, 'reason': str(clip)})
      if len(failures) <= _MOST_NAMED:
        logging.warning('left out %s: %s', record.name, clip)
  if len(failures) > _MOST_NAMED:
    logging.warning('left out %d of %d videos', len(failures), count)
  if not loaded:
    raise UserError(
      f'none of {count} videos could be used, the first one, '
      f'{failures[0]["name"]}: {failures[0]["reason"]}'
    )
  videos, names, labels = zip(*loaded, strict=True)
  return Clips(np.stack(videos), names, np.array(labels), tuple(failures))
