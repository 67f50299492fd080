"""Trajectories of robots: clips of films with states and actions.

Actions are measured: what the state came to be, less what it was. Where things
stand in the way they are better recorded, as what was asked for: of what never
came to be nothing can be measured.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
from typing import Any

import numpy as np

from vjepa_jax.data import robots, sources, storage, transforms
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.pipeline import read_usable
from vjepa_jax.data.readers import Journal
from vjepa_jax.data.records import Episode
from vjepa_jax.data.video import DecodeError
from vjepa_jax.errors import UserError

# Beside shards of episodes: what they were made with.
PREPARED = 'prepare_episodes.json'
STATE_KINDS = 'pose', 'plain', 'hidden'
_NUM_PROBED = 16  # episodes that are checked before training starts
# Of a pose. More is in other units.
_FARTHEST, _LARGEST_ANGLE, _WIDEST = 10.0, math.pi + 1e-3, 1.1


def open_trajectories(path: str, camera: str = '') -> Any:
  """Opens episodes by the form of their path.

  Args:
    path: one of
      `*.csv` or `*.txt`: folders of DROID, see `robots.DroidEpisodes`;
      a folder with meta/info.json: see `robots.LeRobotEpisodes`;
      a folder of ArrayRecord shards: see `robots.EpisodeShards`;
      any other folder: see `robots.EpisodeFolder`.
    camera: Which one, of data sets with several; '' for the first.

  Raises:
    FileNotFoundError: There are no episodes.
    UserError: There is no such camera, or nothing can be read.
  """
  path = os.fspath(path)
  if path.endswith(('.csv', '.txt')):
    return robots.DroidEpisodes(path, camera)
  if storage.exists(os.path.join(path, robots.LEROBOT_INFO)):
    return robots.LeRobotEpisodes(path, camera)
  files = storage.list_files(path)
  if any('.array_record' in os.path.basename(file) for file in files):
    return robots.EpisodeShards(path)
  return robots.EpisodeFolder(path, files)


def check_episode(episode: Episode, state_kind: str) -> None:
  """Raises DecodeError unless an episode is whole and in the right units.

  Args:
    episode: The episode.
    state_kind: See `compute_actions`.
  """
  times = episode.timestamps
  for name, x in episode._asdict().items():
    if not isinstance(x, np.ndarray):
      continue
    axes = {'timestamps': 1, 'video': 4}.get(name, 2)
    if x.ndim != axes or x.shape[:1] != times.shape or not len(x):
      raise DecodeError(
        f'{name} {list(x.shape)} have not {axes} axes, or not a row each of '
        f'the timestamps {list(times.shape)}'
      )
    if x.dtype.kind not in 'fiu':
      raise DecodeError(f'{name} are of type {x.dtype}, not numbers')
    # Features are many: those that are used are looked at.
    if name != 'video' and not np.isfinite(x).all():
      raise DecodeError(f'{name} are not finite')
  if (np.diff(times) <= 0).any():
    raise DecodeError('timestamps do not increase')
  if state_kind == 'hidden' and episode.actions is None:
    raise DecodeError(
      'no recorded actions, one a row: with hidden states they are needed'
    )
  if state_kind == 'pose':
    _check_pose(episode.states)


def _check_pose(states: np.ndarray) -> None:
  """Raises DecodeError unless states are of a robot, in meters and radians."""
  if states.shape[1] < 6:
    raise DecodeError(f'{states.shape[1]} numbers of a state are no pose')
  for what, numbers, most, unit in (
    ('a place', states[:, :3], _FARTHEST, 'meters'),
    ('an angle', states[:, 3:6], _LARGEST_ANGLE, 'radians, from -pi to pi'),
    ('a gripper', states[:, 6:7], _WIDEST, 'shares, from 0 to 1'),
  ):
    largest = np.abs(numbers).max(initial=0)
    if largest > most:
      raise DecodeError(
        f'{what} of a pose is {largest:.1f}: they are in {unit}'
      )


def check_source(source: Any, check: Callable[[Episode], Any]) -> Episode:
  """Checks some episodes of a source, and returns the first that is whole.

  Args:
    source: The episodes.
    check: Raises DecodeError of one that cannot be used.

  Raises:
    UserError: More than half cannot.
  """
  usable, faults = [], []
  for index in range(0, len(source), -(-len(source) // _NUM_PROBED)):
    try:
      episode = source[index]
      check(episode)
      usable.append(index)
    except DecodeError as error:
      faults.append(f'{error.name or episode.name}: {error}')
  if len(faults) > len(usable):
    count = f'{len(faults)} of {len(faults) + len(usable)}'
    raise UserError(
      f'{count} episodes of {source.path} that were looked at cannot be used; '
      f'{faults[-1]}'
    )
  return source[usable[0]]


def sample_rows(
  times: np.ndarray,
  count: int,
  *,
  fps: float | None = None,
  frame_step: int | None = None,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """Samples the rows of a clip.

  Args:
    times: float64 `[T]`, seconds.
    count: Rows of the clip.
    fps: So many of them a second: each is the one nearest in time; or
    frame_step: rows from one to the next, whatever their times, as published.
    rng: Places the clip at random; None at the start.

  Returns:
    int64 `[count]`.

  Raises:
    DecodeError: The episode is shorter, or was recorded at a lower rate.
  """
  if frame_step:
    offsets = np.arange(count) * frame_step
    num_starts = len(times) - offsets[-1]
  else:
    offsets = np.arange(count) / fps
    # Recorders tremble: half a row of the last one will do.
    slack = 0.5 * (times[-1] - times[0]) / max(len(times) - 1, 1)
    ends = times[-1] - offsets[-1] + slack
    num_starts = int(np.searchsorted(times, ends, side='right'))
  if num_starts < 1:
    raise DecodeError(
      f'{len(times)} rows in {times[-1] - times[0]:.2f} s are less than a clip'
    )
  start = 0 if rng is None else int(rng.integers(num_starts))
  if frame_step:
    return start + offsets
  moments = times[start] + offsets
  rows = np.searchsorted(times, moments).clip(1, len(times) - 1)
  rows -= moments - times[rows - 1] < times[rows] - moments
  if (np.diff(rows) < 1).any():
    raise DecodeError(f'recorded at less than {fps:g} rows a second')
  return rows


def compute_actions(states: np.ndarray, state_kind: str) -> np.ndarray:
  """Computes what was done between states.

  Args:
    states: `[T, S]`.
    state_kind: 'plain': differences. 'pose': the first six numbers are a place
      and extrinsic x-y-z Euler angles in radians, of the rotation
      `R = Rz Ry Rx`; their action is the rotation `R' R^T` about the axes of
      the base.

  Returns:
    float32 `[T - 1, S]`.
  """
  actions = np.diff(np.asarray(states, np.float64), axis=0)
  if state_kind == 'pose':
    turns = make_rotation(states[:, 3:6])
    actions[:, 3:6] = find_angles(turns[1:] @ turns[:-1].swapaxes(1, 2))
  return actions.astype(np.float32)


def make_rotation(angles: np.ndarray) -> np.ndarray:
  """Makes matrices `[..., 3, 3]` of extrinsic x-y-z Euler angles `[..., 3]`."""
  rotation = np.eye(3)
  for axis in range(3):
    cos, sin = (f(angles[..., axis], dtype=float) for f in (np.cos, np.sin))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turn = np.zeros((*angles.shape[:-1], 3, 3))
    turn[..., axis, axis] = 1.0
    turn[..., i, i] = turn[..., j, j] = cos
    turn[..., j, i], turn[..., i, j] = sin, -sin
    rotation = turn @ rotation
  return rotation


def find_angles(rotation: np.ndarray) -> np.ndarray:
  """Inverts `make_rotation`, the second angle from -pi / 2 to pi / 2."""
  r = rotation
  return np.stack(
    [
      np.arctan2(r[..., 2, 1], r[..., 2, 2]),
      np.arctan2(-r[..., 2, 0], np.hypot(r[..., 0, 0], r[..., 1, 0])),
      np.arctan2(r[..., 1, 0], r[..., 0, 0]),
    ],
    axis=-1,
  )


@dataclasses.dataclass(frozen=True)
class TrajectoryLoader:
  """Loads one sample: a clip, its states and the actions in between.

  Of `options` the frames, their size and rate and the limits are used. There is
  no augmentation: of each frame the centre is taken, as published.
  """

  sources: tuple[Any, ...]
  options: ClipOptions
  seed: int  # of the run
  # See `compute_actions`. 'hidden': states are shown as 0, and actions are
  # those that were recorded, of rows that follow each other.
  state_kind: str = 'pose'
  extrinsics: bool = False  # load those of the camera too
  journal: Journal = Journal()
  # What a row of the arrays of a stream has to be, but for pixels; None to take
  # whatever comes.
  rows: Mapping[str, np.dtype] | None = None

  num_clips = 1

  @property
  def max_seconds(self) -> float:
    """Seconds of computing for a sample, beyond which its reader is stuck."""
    return 5 * self.options.max_seconds

  def __post_init__(self) -> None:
    if self.state_kind not in STATE_KINDS:
      raise UserError(
        f'state_kind {self.state_kind!r} is not one of {STATE_KINDS}'
      )

  @property
  def clip_bytes(self) -> int:
    """Size of a clip, or of its features."""
    video = sources.find_usable(self.sources[0]).video
    if isinstance(video, np.ndarray):
      return self.options.frames * video[0].nbytes
    return 3 * self.options.frames * self.options.resolution**2

  def __call__(self, position: int, key: tuple[int, int]) -> dict[str, Any]:
    """Loads the sample at a position of the run, see `SampleLoader`.

    Returns:
      The stream 'video': 'pixels' uint8 `[1, T, size, size, 3]`, or 'features'
      `[1, T, H, W, D]`; float32 'states' `[1, T, S]`, 'actions'
      `[1, T - 1, S]` and 'extrinsics' `[1, T, E]`. And 'failures'.
    """
    _, stream, failures = read_usable(self, position, key, self._read)
    return {
      'video': {name: x[None] for name, x in stream.items()},
      'failures': failures,
    }

  def _read(
    self, episode: Episode, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Cuts a clip of an episode."""
    rows, stream = self.cut(episode, rng)
    if 'features' in stream:
      return stream
    return stream | {'pixels': read_frames(episode, rows, self.options)}

  def cut(
    self, episode: Episode, rng: np.random.Generator | None = None
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Cuts the rows of a clip; returns which, and the stream but for pixels."""
    check_episode(episode, self.state_kind)
    options = self.options
    rows = sample_rows(
      episode.timestamps,
      options.frames,
      fps=options.fps,
      frame_step=options.frame_step,
      rng=rng,
    )
    states = episode.states[rows].astype(np.float32)
    if self.state_kind == 'hidden':
      if (np.diff(rows) != 1).any():
        raise DecodeError('actions of rows in between would be left out')
      stream = {
        'states': np.zeros_like(states),
        'actions': episode.actions[rows[:-1]].astype(np.float32),
      }
    else:
      actions = compute_actions(states, self.state_kind)
      stream = {'states': states, 'actions': actions}
    if self.extrinsics:
      if episode.extrinsics is None:
        raise DecodeError('no extrinsics of the camera: train without them')
      stream['extrinsics'] = episode.extrinsics[rows].astype(np.float32)
    if isinstance(episode.video, np.ndarray):
      stream['features'] = episode.video[rows]
      if not np.isfinite(stream['features']).all():
        raise DecodeError('features are not finite')
    found = _describe_rows(stream)
    if self.rows and found != self.rows:
      found, expected = map(_format_rows, (found, self.rows))
      raise DecodeError(f'its rows are {found}; those of others {expected}')
    return rows, stream


def fit_loader(loader: TrajectoryLoader) -> tuple[TrajectoryLoader, Episode]:
  """Checks the sources of a loader, and that they are alike.

  Returns:
    The loader, which takes only what is like the first episode from now on, and
    that episode.

  Raises:
    UserError: More than half of a source's episodes cannot be used so.
  """
  first = None
  for source in loader.sources:
    episode = check_source(source, loader.cut)
    first = first or episode
    rows = loader.rows or _describe_rows(loader.cut(episode)[1])
    loader = dataclasses.replace(loader, rows=rows)
  return loader, first


def _describe_rows(stream: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
  return {k: np.dtype((x.dtype, x.shape[1:])) for k, x in stream.items()}


def _format_rows(rows: Mapping[str, np.dtype]) -> str:
  return ', '.join(f'{k} {x.base}{list(x.shape)}' for k, x in rows.items())


def read_frames(
  episode: Episode, rows: np.ndarray, options: ClipOptions
) -> np.ndarray:
  """Reads the frames of some rows, uint8 `[T, size, size, 3]`.

  Of each the largest centred part no wider than 1.35 times its height, squeezed
  to a square.

  Raises:
    DecodeError: The film cannot be read, or ends before.
  """
  frames = episode.first_frame + rows
  with open_video(episode.video, options.limits) as video:
    if frames[-1] >= video.num_frames:
      raise DecodeError(
        f'{video.num_frames} frames are fewer than the rows of states'
      )
    box = transforms.crop_to_aspect(video.height, video.width)
    return video.read(frames, box, (options.resolution,) * 2)
