"""Episodes of DROID and LeRobot, as their folders are laid out."""

import json

import episodes
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from vjepa_jax.data import trajectories
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.encode import write_video
from vjepa_jax.data.video import DecodeError
from vjepa_jax.errors import UserError

ROWS = 12
OPTIONS = ClipOptions(frames=3, resolution=16, fps=5.0, frame_step=None)


def write_film(path, lengths):
  """Writes a film of some episodes, each brighter from frame to frame."""
  path.parent.mkdir(parents=True, exist_ok=True)
  light = np.concatenate([20 + episodes.STEP * np.arange(n) for n in lengths])
  frames = np.zeros((len(light), 16, 24, 3), np.uint8)
  write_video(path, frames + light[:, None, None, None].astype(np.uint8), 60)


def check_frames(source, kind):
  """Checks that rows are read with their frames, in every episode."""
  loader = trajectories.TrajectoryLoader((source,), OPTIONS, 0, kind)
  for index in range(len(source)):
    sample = loader(index, (0, index))
    assert not sample['failures']
    stream = sample['video']
    states = source[index].states
    rows = [(states == s).all(axis=1).argmax() for s in stream['states'][0]]
    light = stream['pixels'][0].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(
      light, 20 + episodes.STEP * np.array(rows), atol=2
    )


@pytest.fixture(scope='module')
def droid(tmp_path_factory):
  h5py = pytest.importorskip('h5py')
  folder = tmp_path_factory.mktemp('droid')
  rng = np.random.default_rng(0)
  for i, name in enumerate(('lab/success/a', 'lab/failure/b', 'lab/c')):
    episode = folder / name
    write_film(episode / f'recordings/MP4/{i}7.mp4', [ROWS])
    states = episodes.make_states(rng, ROWS)
    metadata = {'left_mp4_path': f'lab/x/recordings/MP4/{i}7.mp4'}
    (episode / 'metadata_1.json').write_text(json.dumps(metadata))
    with h5py.File(episode / 'trajectory.h5', 'w') as file:
      robot = 'observation/robot_state'
      file[f'{robot}/cartesian_position'] = states[:, :6]
      file[f'{robot}/gripper_position'] = states[:, 6]
      file[f'observation/camera_extrinsics/{i}7_left'] = np.ones((ROWS, 6))
      if not i:
        times = 1000 * (5 + np.arange(ROWS) / episodes.RATE)
        camera = f'observation/timestamp/cameras/{i}7_estimated_capture'
        file[camera] = times.astype(np.int64)
  (folder / 'lab/c/trajectory.h5').write_bytes(b'no')
  path = folder / 'train.csv'
  path.write_text('lab/success/a 0\nlab/failure/b\n\nlab/c\n')
  return path


def test_droid(droid):
  source = trajectories.open_trajectories(droid)
  assert len(source) == 3 and len(source.hash_names()) == 64
  first, second = source[0], source[1]
  assert first.name == 'lab/success/a' and first.states.shape == (ROWS, 7)
  assert first.extrinsics.shape == (ROWS, 6)
  # Of the camera, or at the rate that was aimed at.
  np.testing.assert_allclose(first.timestamps, np.arange(ROWS) / 10)
  np.testing.assert_allclose(second.timestamps, np.arange(ROWS) / 15)
  with pytest.raises(DecodeError, match='cannot read') as error:
    source[2]
  assert error.value.name == 'lab/c'
  source._folders.pop()
  check_frames(source, 'pose')
  (droid.parent / 'lab/success/a/metadata_1.json').rename(droid.parent / 'gone')
  with pytest.raises(DecodeError, match=r'no metadata_\*.json'):
    source[0]
  with pytest.raises(UserError, match="camera 'top' of DROID: 'left'"):
    trajectories.open_trajectories(droid, 'top')
  with pytest.raises(DecodeError, match='wrist_mp4_path'):
    trajectories.open_trajectories(droid, 'wrist')[1]


def _make_table(rng, numbers):
  columns = {'observation.state': [], 'action': [], 'timestamp': []}
  columns['episode_index'] = []
  for number in numbers:
    states = episodes.make_states(rng, ROWS, 'plain').tolist()
    columns['observation.state'] += states
    columns['action'] += [[float(number)] * 3] * ROWS
    columns['timestamp'] += (np.arange(ROWS) / episodes.RATE).tolist()
    columns['episode_index'] += [number] * ROWS
  return pa.table(columns)


@pytest.mark.parametrize('version', ['v2.1', 'v3.0'])
def test_lerobot(version, tmp_path):
  rng = np.random.default_rng(0)
  top = 'observation.images.top'
  info = {
    'codebase_version': version,
    'fps': episodes.RATE,
    'features': {
      'observation.state': {'dtype': 'float32'},
      'timestamp': {'dtype': 'float32'},
      'action': {'dtype': 'float32'},
      top: {'dtype': 'video'},
      'observation.images.wrist': {'dtype': 'video'},
    },
  }
  (tmp_path / 'meta').mkdir()
  tables = {}
  if version == 'v2.1':
    info |= {
      'chunks_size': 2,
      'data_path': 'data/chunk-{episode_chunk:03d}/'
      'episode_{episode_index:06d}.parquet',
      'video_path': 'videos/chunk-{episode_chunk:03d}/{video_key}/'
      'episode_{episode_index:06d}.mp4',
    }
    lines = [f'{{"episode_index": {i}, "length": {ROWS}}}\n' for i in range(3)]
    (tmp_path / 'meta/episodes.jsonl').write_text(''.join(lines))
    for i in range(3):
      name = f'chunk-{i // 2:03d}'
      tables[f'data/{name}/episode_{i:06d}.parquet'] = _make_table(rng, [i])
      write_film(tmp_path / f'videos/{name}/{top}/episode_{i:06d}.mp4', [ROWS])
  else:
    name = 'chunk-{chunk_index:03d}/file-{file_index:03d}'
    info |= {
      'data_path': f'data/{name}.parquet',
      'video_path': f'videos/{{video_key}}/{name}.mp4',
    }
    rows = [
      {
        'episode_index': i,
        'data/chunk_index': 0,
        'data/file_index': 0,
        f'videos/{top}/chunk_index': 0,
        f'videos/{top}/file_index': 1,
        f'videos/{top}/from_timestamp': i * ROWS / episodes.RATE,
      }
      for i in range(3)
    ]
    tables['meta/episodes/chunk-000/file-000.parquet'] = pa.Table.from_pylist(
      rows
    )
    tables['data/chunk-000/file-000.parquet'] = _make_table(rng, range(3))
    film = tmp_path / f'videos/{top}/chunk-000/file-001.mp4'
    write_film(film, [ROWS] * 3)
  (tmp_path / 'meta/info.json').write_text(json.dumps(info))
  for path, table in tables.items():
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, tmp_path / path)
  source = trajectories.open_trajectories(tmp_path)
  assert len(source) == 3 and source[2].name == 'episode 2'
  assert (source[2].actions == 2).all() and source[2].actions.shape == (ROWS, 3)
  check_frames(source, 'plain')
  hashed = source.hash_names()
  assert trajectories.open_trajectories(tmp_path).hash_names() == hashed
  (tmp_path / 'meta/info.json').write_text(json.dumps(info | {'fps': 9}))
  assert trajectories.open_trajectories(tmp_path).hash_names() != hashed
  for camera in ('side', 'rist', 'images.wrist'):
    with pytest.raises(UserError, match=f"no video '{camera}', only"):
      trajectories.open_trajectories(tmp_path, camera)
