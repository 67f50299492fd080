"""Chooses which frames of a video make a clip."""

import numpy as np

# A sampling time this close below a frame's own time, as a fraction of the
# mean frame interval, shows that frame: Matroska rounds times to milliseconds.
_CLOCK_SLACK = 0.05


def sample_frames(
  times: np.ndarray,
  frames_per_clip: int,
  *,
  frame_step: int | None = None,
  fps: float | None = None,
  num_clips: int = 1,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """Samples clips, one from each of `num_clips` equal parts of a video.

  A clip is a window of `frames_per_clip * frame_step` frames, or of
  `frames_per_clip / fps` seconds. As published, its frames are a linspace over
  the window with both ends included, truncated to whole frames, the last one
  being the last frame inside the window. The effective step is therefore
  frames_per_clip / (frames_per_clip - 1) times the nominal one; with a step of
  1 the frames are consecutive. A part shorter than the window is covered at
  the nominal step and its last frame repeated.

  `fps` works on presentation times, so videos with a variable rate are sampled
  evenly, and one slower than `fps` repeats frames. The published code instead
  takes the whole step ceil(video fps) // fps, which samples 25 fps video at
  4.17 instead of 4 frames per second and fails on slower videos.

  Args:
    times: float [N], presentation times in seconds, increasing.
    frames_per_clip: T.
    frame_step: distance between sampled frames, in frames of the video.
    fps: sampled frames per second. Exactly one of `frame_step` and `fps`.
    num_clips: number of equal parts.
    rng: places each window at random in its part, at a frame. Without it
      (evaluation) the window is the first of its part, as published.

  Returns:
    int64 [num_clips, T], frame numbers, non-decreasing along T.

  Raises:
    ValueError: if the arguments contradict each other or are not positive.
  """
  is_one = (frame_step is None) != (fps is None)
  if not is_one or min(frames_per_clip, num_clips, frame_step or fps or 0) <= 0:
    raise ValueError(
      f'frames_per_clip={frames_per_clip}, num_clips={num_clips}, '
      f'frame_step={frame_step}, fps={fps}: all must be positive, and exactly '
      'one of the last two be given'
    )
  num_frames = len(times)
  if not num_frames:
    raise ValueError('a video without frames cannot be sampled')
  if frame_step is not None:
    clock = np.arange(num_frames, dtype=np.float64)
    step = float(frame_step)
    # Whole parts, as published; a video may have fewer frames than parts.
    part = float(max(num_frames // num_clips, 1))
    slack = 0.0
  else:
    clock = np.asarray(times, np.float64) - times[0]
    interval = clock[-1] / (num_frames - 1) if num_frames > 1 else 1 / fps
    step = 1 / fps
    # The last frame stays on screen for an interval too.
    part = (clock[-1] + interval) / num_clips
    slack = interval * _CLOCK_SLACK
  clips = [
    _sample_part(clock, i * part, part, frames_per_clip, step, slack, rng)
    for i in range(num_clips)
  ]
  return np.stack(clips)


def _sample_part(
  clock: np.ndarray,
  begin: float,
  part: float,
  frames_per_clip: int,
  step: float,
  slack: float,
  rng: np.random.Generator | None,
) -> np.ndarray:
  """Samples one clip from the part [begin, begin + part) of a clock.

  Args:
    clock: float64 [N], the frames' times, in frames or seconds.
    begin: start of the part, in units of the clock.
    part: length of the part.
    frames_per_clip: T.
    step: nominal distance between sampled frames.
    slack: how much later than asked for a frame may begin.
    rng: places the window, or None for the start of the part.

  Returns:
    int64 [T], frame numbers.
  """
  window = frames_per_clip * step
  if part > window + slack:
    if rng is not None:
      first = np.searchsorted(clock, begin - slack)
      stop = np.searchsorted(clock, begin + part - window - slack)
      if stop > first:
        begin = clock[rng.integers(first, stop)]
    end = begin + window
    moments = np.linspace(begin, end, frames_per_clip)
  else:
    end = begin + part
    available = min(int((part + slack) / step), frames_per_clip)
    moments = np.full(frames_per_clip, end)
    moments[:available] = np.linspace(begin, end, available)
  frames = np.searchsorted(clock, moments + slack, side='right') - 1
  last = np.searchsorted(clock, end - slack) - 1
  return np.clip(frames, 0, max(last, 0)).astype(np.int64)
