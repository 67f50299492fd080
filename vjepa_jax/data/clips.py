"""Clips in memory, cut deterministically, for looking at a finished model."""

from collections.abc import Sequence
import concurrent.futures
import dataclasses

from absl import logging
import numpy as np

from vjepa_jax.data import decode, sampling, sources, transforms
from vjepa_jax.data.pipeline import ClipOptions, read_clips
from vjepa_jax.progress import make_bar

# Further videos that cannot be used are counted and not named in the log.
_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Clips:
  """Clips and where they are from.

  Attributes:
    videos: uint8 `[N, frames, size, size, 3]`.
    names: Of their videos.
    failures: Name and reason of each video that was left out.
  """

  videos: np.ndarray
  names: tuple[str, ...]
  failures: tuple[dict[str, str], ...] = ()


def load_clips(
  source: Sequence[sources.Record],
  options: ClipOptions,
  *,
  limit: int | None = None,
  num_threads: int = 2,
  whole: bool = False,
) -> Clips:
  """Decodes the first clip of each video, at the centre.

  Args:
    source: The videos.
    options: How clips are cut; crops and times are those of evaluation.
    limit: At most so many videos, a fixed random subset.
    num_threads: Decoding threads.
    whole: Leave out videos that are shorter than a clip, whose last frame would
      be repeated.

  Raises:
    ValueError: No video can be used.
  """
  count = min(len(source), limit or len(source))
  order = np.random.default_rng(0).permutation(len(source))
  indices = np.sort(order[:count])
  options = dataclasses.replace(options, num_clips=1)

  def load(index):
    record = source[int(index)]
    try:
      if whole:
        return record.name, read_from(record.video, options, 0.0)[0], None
      return record.name, read_clips(record, options)[0], None
    except decode.DecodeError as error:
      return record.name, None, str(error)

  clips, names, failures = [], [], []
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    for name, clip, reason in make_bar(
      pool.map(load, indices),
      total=count,
      unit='clip',
      leave=False,
      desc='decoding clips',
    ):
      if clip is None:
        if len(failures) < _MOST_NAMED:
          logging.warning('left out %s: %s', name, reason)
        failures.append({'name': name, 'reason': reason})
      else:
        clips.append(clip)
        names.append(name)
  if len(failures) > _MOST_NAMED:
    logging.warning('left out %d of %d videos', len(failures), count)
  if not clips:
    raise ValueError(
      f'none of {count} videos could be used, the first one, '
      f'{failures[0]["name"]}: {failures[0]["reason"]}'
    )
  return Clips(np.stack(clips), tuple(names), tuple(failures))


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
  with decode.open_video(video) as opened:
    times = opened.times
    first = int(np.searchsorted(times, start - 1e-3))
    interval = times[-1] / max(len(times) - 1, 1) if len(times) > 1 else 1.0
    end = times[-1] + interval
    if options.fps:
      seconds = options.frames / options.fps
    else:
      seconds = options.frames * options.frame_step * interval
    if start < 0 or start + seconds > end + 0.5 * interval:
      raise decode.DecodeError(
        f'{options.frames} frames from {start:.2f} s on take {seconds:.2f} s, '
        f'the video has {end:.2f} s'
      )
    indices = sampling.sample_frames(
      times[first:],
      options.frames,
      frame_step=options.frame_step,
      fps=options.fps,
    )[0]
    box = transforms.center_crop(opened.height, opened.width)
    size = (options.resolution, options.resolution)
    clip = opened.read(indices + first, box, size)
    return clip, options.frames / seconds


def read_windows(
  video: str | bytes | np.ndarray, options: ClipOptions, limit: int
) -> Clips:
  """Cuts a video into clips, one after the other; at most `limit` of them.

  Raises:
    DecodeError: The video cannot be read, or is shorter than one clip.
  """
  with decode.open_video(video) as opened:
    end = opened.times[-1] + 1.0 / opened.fps
    rate = options.fps or opened.fps / options.frame_step
  seconds = options.frames / rate
  count = max(1, int(end / seconds + 1e-6))
  starts = np.arange(count)[: limit or None] * seconds
  clips = [read_from(video, options, float(start))[0] for start in starts]
  return Clips(np.stack(clips), tuple(f'{start:.1f} s' for start in starts))
