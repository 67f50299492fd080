"""Episodes as data sets of robots have them: DROID as it was recorded, LeRobot.

As in `EpisodeFolder`, a row of states belongs to a frame.
"""

from collections.abc import Iterator, Mapping, Sequence
import io
import json
import os
from typing import Any

import numpy as np

from vjepa_jax.data import sources, storage
from vjepa_jax.data.records import Episode, load_arrays
from vjepa_jax.data.video import DecodeError, explain_damage
from vjepa_jax.errors import UserError

_DROID_RATE = 15.0  # rows a second, where their times were not recorded
LEROBOT_INFO = 'meta/info.json'


class EpisodeFolder:
  """Episodes of a folder: `NAME.mp4` and `NAME.npz`, one row a frame.

  The second has 'states' `[T, S]`, 'timestamps' `[T]`, in seconds, and may have
  'extrinsics' `[T, E]` and 'actions' `[T, A]`, which are read where states are
  hidden.
  """

  def __init__(self, path: str, files: Sequence[str] | None = None) -> None:
    """Lists the folder, unless its files are given.

    Raises:
      FileNotFoundError: There are no episodes in it.
    """
    self.path = path = os.fspath(path)
    files = storage.list_files(path) if files is None else files
    self._files = sorted(f for f in files if f.endswith('.npz'))
    if not self._files:
      raise FileNotFoundError(
        f'no episodes in {path}: looked for NAME.npz beside NAME.mp4'
      )

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Episode:
    file, name = self._files[index], self.name(index)
    with explain_damage(name):
      arrays = load_arrays(storage.read(file))
      rows = {k: arrays[k] for k in ('states', 'timestamps')}
    more = {k: arrays.get(k) for k in ('extrinsics', 'actions')}
    video = f'{file.removesuffix(".npz")}.mp4'
    return Episode(video, **rows, **more, name=name)

  def name(self, index: int) -> str:
    """Returns the name of an episode, without reading it."""
    file = self._files[index].removeprefix(self.path)
    return file.lstrip(os.sep).removesuffix('.npz')

  def hash_names(self) -> str:
    return sources.hash_text(os.path.basename(f) for f in self._files)


class EpisodeShards(sources.ArrayRecordSource):
  """The shards that `vjepa_jax.tools.prepare_episodes` writes."""

  _KIND = Episode
  _REFUSAL = 'the shards hold no episodes'

  def name(self, index: int) -> str:
    """Returns which record it is, without reading it."""
    return self._records.name(index)


class DroidEpisodes:
  """Episodes of DROID, from a text file: one folder a line, no header.

  In a folder are `metadata_*.json`, `trajectory.h5` and `recordings/MP4`. Films
  say 60 frames a second, of which there were about 15: times are those of the
  camera.
  """

  def __init__(self, path: str, camera: str = '') -> None:
    """Reads the list; `camera` is 'left' (none given), 'right' or 'wrist'.

    Raises:
      UserError: There is nothing in it, no such camera, or no h5py.
    """
    self.path, self._camera = os.fspath(path), camera or 'left'
    if self._camera not in ('left', 'right', 'wrist'):
      raise UserError(f"camera {camera!r} of DROID: 'left', 'right' or 'wrist'")
    lines = storage.read(path).decode().splitlines()
    self._folders = [line.split()[0] for line in lines if line.strip()]
    if not self._folders:
      raise UserError(f'{path} lists no folders of episodes')
    _import_h5py()

  def __len__(self) -> int:
    return len(self._folders)

  def __getitem__(self, index: int) -> Episode:
    name = folder = self._folders[index]
    if not storage.is_remote(name):
      folder = os.path.join(os.path.dirname(self.path), name)
    with explain_damage(name):
      files = sorted(storage.list_files(folder))
      json_files = [f for f in files if f.endswith('.json')]
      if not json_files:
        raise DecodeError('no metadata_*.json in its folder')
      metadata = json.loads(storage.read(json_files[0]))
      film = os.path.basename(metadata[f'{self._camera}_mp4_path'])
      serial = os.path.splitext(film)[0]
      content = storage.read(os.path.join(folder, 'trajectory.h5'))
      with _import_h5py().File(io.BytesIO(content)) as file:
        observed = file['observation']
        robot = observed['robot_state']
        gripper = np.asarray(robot['gripper_position'])
        states = [np.asarray(robot['cartesian_position']), gripper[:, None]]
        places = observed.get(f'camera_extrinsics/{serial}_left')
        times = observed.get(f'timestamp/cameras/{serial}_estimated_capture')
        if times is None:
          times = np.arange(len(gripper)) / _DROID_RATE
        else:
          times = (np.asarray(times, np.float64) - times[0]) / 1000
        places = None if places is None else np.asarray(places, np.float32)
      return Episode(
        os.path.join(folder, 'recordings', 'MP4', film),
        np.concatenate(states, axis=1).astype(np.float32),
        times,
        name,
        places,
      )

  def name(self, index: int) -> str:
    """Returns the name of an episode, without reading it."""
    return self._folders[index]

  def hash_names(self) -> str:
    return sources.hash_text([self._camera, *self._folders])


class LeRobotEpisodes:
  """Episodes of a LeRobot data set, versions 2 and 3.

  States are `observation.state`, recorded actions `action`.
  """

  def __init__(self, path: str, camera: str = '') -> None:
    """Reads which episodes there are.

    Args:
      path: Folder of the data set.
      camera: Name of a video, `observation.images.NAME` or NAME; '' for the
        first.

    Raises:
      UserError: There is no such video, or no episode.
    """
    self.path = os.fspath(path)
    info = json.loads(storage.read(os.path.join(self.path, LEROBOT_INFO)))
    features = info['features'].items()
    videos = sorted(k for k, f in features if f['dtype'] == 'video')
    names = (camera, f'observation.images.{camera}') if camera else videos[:1]
    self._video = next((v for v in videos if v in names), None)
    if self._video is None:
      raise UserError(f'{path} has no video {camera!r}, only {videos}')
    self._columns = [
      name
      for name in ('observation.state', 'timestamp', 'action')
      if name in info['features']
    ]
    # Tells data sets apart whose episodes are numbered alike.
    self._info = json.dumps(info, sort_keys=True)
    is_third = info['codebase_version'].startswith('v3')
    list_episodes = self._list_third if is_third else self._list_second
    self._episodes = list(list_episodes(info))
    if not self._episodes:
      raise UserError(f'{path} has no episodes')

  def _list_second(self, info: Mapping[str, Any]) -> Iterator[tuple]:
    """Yields number, paths of data and video, and first frame."""
    lines = storage.read(os.path.join(self.path, 'meta/episodes.jsonl'))
    for line in lines.splitlines():
      number = json.loads(line)['episode_index']
      fields = {
        'episode_chunk': number // info['chunks_size'],
        'episode_index': number,
        'video_key': self._video,
      }
      paths = (info[k].format(**fields) for k in ('data_path', 'video_path'))
      yield number, *paths, 0

  def _list_third(self, info: Mapping[str, Any]) -> Iterator[tuple]:
    """Yields the same; of version 3 several episodes share a file."""
    folder = os.path.join(self.path, 'meta/episodes')
    video = f'videos/{self._video}'
    for path in sorted(storage.list_files(folder)):
      for row in _read_table(path).to_pylist():
        paths = [
          info[f'{kind}_path'].format(
            chunk_index=row[f'{prefix}/chunk_index'],
            file_index=row[f'{prefix}/file_index'],
            video_key=self._video,
          )
          for kind, prefix in (('data', 'data'), ('video', video))
        ]
        start = row[f'{video}/from_timestamp']
        yield row['episode_index'], *paths, round(start * info['fps'])

  def __len__(self) -> int:
    return len(self._episodes)

  def __getitem__(self, index: int) -> Episode:
    number, data, video, first = self._episodes[index]
    name = self.name(index)
    with explain_damage(name):
      table = _read_table(
        os.path.join(self.path, data), [*self._columns, 'episode_index']
      )
      table = table.filter(table['episode_index'].to_numpy() == number)
      rows = {k: np.array(table[k].to_pylist()) for k in self._columns}
      actions = rows.get('action')
      return Episode(
        os.path.join(self.path, video),
        rows['observation.state'].astype(np.float32),
        rows['timestamp'].astype(np.float64),
        name,
        actions=None if actions is None else actions.astype(np.float32),
        first_frame=first,
      )

  def name(self, index: int) -> str:
    """Returns the name of an episode, without reading it."""
    return f'episode {self._episodes[index][0]}'

  def hash_names(self) -> str:
    numbers = (str(number) for number, *_ in self._episodes)
    return sources.hash_text([self._info, self._video, *numbers])


def _read_table(path: str, columns: Sequence[str] | None = None) -> Any:
  """Reads a parquet table, or some columns of it."""
  # Imported late: worker processes start sooner.
  import pyarrow as pa
  from pyarrow import parquet

  is_remote = storage.is_remote(path)
  # Not `read_table`, whose scanner waits for ever in some damaged files.
  with parquet.ParquetFile(
    pa.BufferReader(storage.read(path)) if is_remote else path
  ) as file:
    return file.read(columns)


def _import_h5py() -> Any:
  try:
    import h5py
  except ImportError:
    raise UserError(
      "DROID's trajectories are HDF5: pip install h5py, or -e '.[robots]'"
    ) from None
  return h5py
