"""Trajectories: rows and frames that belong together, actions, faults."""

import contextlib
import dataclasses
import json
import math

import episodes
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vjepa_jax.data import (
  pipeline,
  records,
  robots,
  trajectories,
  transforms,
)
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.readers import open_journal
from vjepa_jax.data.records import Episode
from vjepa_jax.data.video import DecodeError
from vjepa_jax.errors import UserError
from vjepa_jax.sets import discs

OPTIONS = ClipOptions(frames=4, resolution=16, fps=5.0, frame_step=None)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return episodes.write_episodes(tmp_path_factory.mktemp('episodes'), 3)


class Episodes(list):
  """A source."""

  path = 'some'


def make_loader(folder, options=OPTIONS, **fields):
  source = trajectories.open_trajectories(folder)
  return trajectories.TrajectoryLoader((source,), options, 0, **fields)


def make_episode(rows=20, **fields):
  states = episodes.make_states(np.random.default_rng(0), rows)
  times = np.arange(rows) / episodes.RATE
  return Episode('', states, times, 'it')._replace(**fields)


def test_rotations_are_those_of_scipy():
  angles = np.random.default_rng(0).uniform(-1.5, 1.5, (50, 3))
  angles[:, ::2] *= 2
  ours = trajectories.make_rotation(angles)
  np.testing.assert_allclose(
    ours, Rotation.from_euler('xyz', angles).as_matrix(), atol=1e-12
  )
  np.testing.assert_allclose(trajectories.find_angles(ours), angles, atol=1e-12)


def test_a_pose_and_its_action_give_the_next_pose():
  states = make_episode().states
  actions = trajectories.compute_actions(states, 'pose')
  assert actions.dtype == np.float32 and actions.shape == (19, 7)
  turned = Rotation.from_euler('xyz', actions[:, 3:6]) * Rotation.from_euler(
    'xyz', states[:-1, 3:6]
  )
  for ours, expected in (
    (turned.as_matrix(), trajectories.make_rotation(states[1:, 3:6])),
    (actions[:, :3] + states[:-1, :3], states[1:, :3]),
    (actions[:, 6] + states[:-1, 6], states[1:, 6]),
  ):
    np.testing.assert_allclose(ours, expected, atol=1e-6)
  # The state jumps by a whole turn, what was done does not.
  assert np.abs(actions[:, 3:6]).max() < 0.1
  states[1:, 3] -= 2 * math.pi
  np.testing.assert_allclose(
    trajectories.compute_actions(states, 'pose'), actions, atol=1e-6
  )
  plain = trajectories.compute_actions(states, 'plain')
  np.testing.assert_allclose(plain, np.diff(states, axis=0), rtol=1e-5)


def test_rows_are_sampled_by_their_time():
  times = np.array([0.0, 0.11, 0.19, 0.3, 0.42, 0.5, 0.61, 0.7])
  rows = trajectories.sample_rows(times, 3, fps=5.0)
  assert rows.tolist() == [0, 2, 4]
  rng = np.random.default_rng(0)
  starts = {
    int(trajectories.sample_rows(times, 3, fps=5.0, rng=rng)[0])
    for _ in range(50)
  }
  assert starts == {0, 1, 2, 3}
  for fps, count, message in (
    (5.0, 6, '8 rows in 0.70 s are less than a clip'),
    (20.0, 3, 'recorded at less than 20 rows a second'),
  ):
    with pytest.raises(DecodeError, match=message):
      trajectories.sample_rows(times, count, fps=fps)


def test_rows_are_sampled_by_their_number():
  times = np.arange(12.0)
  rng = np.random.default_rng(0)
  drawn = {
    tuple(trajectories.sample_rows(times, 3, frame_step=5, rng=rng))
    for _ in range(20)
  }
  assert drawn == {(0, 5, 10), (1, 6, 11)}
  with pytest.raises(DecodeError, match='12 rows'):
    trajectories.sample_rows(times, 4, frame_step=4)


def test_frames_and_rows_belong_together(folder):
  loader = make_loader(folder, extrinsics=True)
  stream = loader(3, (0, 1))['video']
  shapes = {name: x.shape for name, x in stream.items()}
  assert shapes == {
    'pixels': (1, 4, 16, 16, 3),
    'states': (1, 4, 7),
    'actions': (1, 3, 7),
    'extrinsics': (1, 4, 6),
  }
  states = loader.sources[0][1].states
  matches = (states == stream['states'][0][:, None]).all(axis=-1)
  rows = matches.argmax(axis=1)
  assert matches.sum() == 4 and set(np.diff(rows)) <= {1, 2, 3}
  brightness = stream['pixels'][0].mean(axis=(1, 2, 3))
  np.testing.assert_allclose(brightness, 20 + episodes.STEP * rows, atol=2)
  again = make_loader(folder, extrinsics=True)(3, (0, 1))['video']
  for name, expected in stream.items():
    np.testing.assert_array_equal(again[name], expected)
  assert (loader(4, (0, 1))['video']['states'] != stream['states']).any()


def test_features_take_the_place_of_frames(folder):
  features = np.arange(20.0, dtype=np.float16).reshape(20, 1, 1, 1)

  source = Episodes([make_episode(video=features)])
  loader = trajectories.TrajectoryLoader((source,), OPTIONS, 0)
  loader, _ = trajectories.fit_loader(loader)
  assert loader.clip_bytes == 4 * 2
  stream = loader(0, (0, 0))['video']
  assert 'pixels' not in stream
  assert loader.clip_bytes == 4 * 2
  assert (np.diff(stream['features'].ravel()) == 2).all()


def test_bad_episodes_are_replaced_and_named(tmp_path):
  episodes.write_episodes(tmp_path, 4, rows=16)
  whole = dict(np.load(tmp_path / '000.npz'))
  for name, changes in (
    ('001', {'timestamps': whole['timestamps'][:-1]}),
    ('002', {'states': whole['states'] * np.nan}),
  ):
    np.savez(tmp_path / f'{name}.npz', **(whole | changes))
  (tmp_path / '003.mp4').write_bytes(b'')
  loader = make_loader(tmp_path)
  expected = loader(0, (0, 0))['video']['states'].shape
  for index, reason in (
    (1, 'not a row each of the timestamps [15]'),
    (2, 'states are not finite'),
    (3, 'empty file'),
  ):
    sample = loader(index, (0, index))
    assert sample['video']['states'].shape == expected
    assert sample['failures'][0]['name'] == f'{index:03}'
    assert reason in sample['failures'][0]['reason']
  for content in (b'PK', b''):
    (tmp_path / '002.npz').write_bytes(content)
    assert '002' in loader(2, (0, 2))['failures'][0]['name']
  # As batches of any number of hosts, from any position.
  whole, part = (
    next(iter(pipeline.make_batches(loader, weights=[1.0], batch_size=4, **k)))
    for k in ({}, {'position': 2})
  )
  for name in ('pixels', 'states', 'actions'):
    np.testing.assert_array_equal(
      whole['video'][name][2:], part['video'][name][:2]
    )


def test_damaged_records_of_episodes_are_said_to_be_so():
  data = records.pack(make_episode(video=b'film'))
  assert records.unpack(data).video == b'film'
  start = data.index(b'PK')
  with pytest.raises(ValueError, match='not a record'):
    records.unpack(data[:start] + bytes(len(data) - start))
  for at in range(start, len(data), 97):
    damaged = bytearray(data)
    damaged[at] ^= 255
    with contextlib.suppress(ValueError):
      records.unpack(bytes(damaged))


@pytest.mark.parametrize(
  'changes,reason',
  [
    ({'extrinsics': np.zeros((3, 6))}, 'extrinsics [3, 6] have not 2 axes, or'),
    ({'extrinsics': np.full((16, 6), np.nan)}, 'extrinsics are not finite'),
    ({'extrinsics': np.zeros((16, 5))}, 'extrinsics float32[5]; those of oth'),
    ({'states': np.zeros((16, 8))}, 'its rows are states float32[8], actions'),
    ({'states': np.full((16, 7), 'a')}, 'states are of type <U1, not numbers'),
  ],
)
def test_odd_episodes_are_replaced_and_named(tmp_path, changes, reason):
  episodes.write_episodes(tmp_path, 4, rows=16)
  path = tmp_path / '002.npz'
  np.savez(path, **(dict(np.load(path)) | changes))
  loader, first = trajectories.fit_loader(
    make_loader(tmp_path, extrinsics=True)
  )
  assert first.name == '000'
  batches = pipeline.make_batches(loader, weights=[1.0], batch_size=4)
  (failures,) = next(iter(batches))['failures']
  assert '"002"' in failures and reason in failures


def test_sources_that_are_not_alike_are_refused(folder, tmp_path):
  loader = make_loader(folder)
  other = episodes.write_episodes(tmp_path / 'other', 2, kind='plain')
  loader = dataclasses.replace(
    loader,
    sources=(*loader.sources, trajectories.open_trajectories(other)),
    state_kind='plain',
  )
  with pytest.raises(UserError, match='2 of 2 episodes of .*other .* float32'):
    trajectories.fit_loader(loader)


def test_who_reads_the_arrays_of_an_episode_is_watched(folder, tmp_path):
  journal = open_journal(str(tmp_path), 0)
  noted = []

  class Watched(robots.EpisodeFolder):
    def __getitem__(self, index):
      (note,) = (tmp_path / 'reading-0').iterdir()
      noted.append(json.loads(note.read_text().splitlines()[0]))
      return super().__getitem__(index)

  loader = make_loader(folder)
  loader = dataclasses.replace(
    loader, sources=(Watched(folder),), journal=journal
  )
  assert not loader(1, (0, 1))['failures']
  assert noted == [[1, [0, 1], f'{folder}: 001']]
  journal = journal.exclude({f'{folder}: 001': 'SIGSEGV'})
  loader = dataclasses.replace(loader, journal=journal)
  assert loader(1, (0, 1))['failures'][0]['name'] == '001'
  assert len(noted) == 2


def check_pose(source):
  return trajectories.check_source(
    source, lambda episode: trajectories.check_episode(episode, 'pose')
  )


def test_units_are_checked_before_the_start(folder, tmp_path):
  source = trajectories.open_trajectories(folder)
  assert check_pose(source).name == '000'
  assert len(source.hash_names()) == 64
  episodes.write_episodes(tmp_path, 1)
  arrays = dict(np.load(tmp_path / '000.npz'))
  arrays['states'][:, 3:6] *= 180 / math.pi
  np.savez(tmp_path / '000.npz', **arrays)
  degrees = trajectories.open_trajectories(tmp_path)
  with pytest.raises(UserError, match='000: an angle .* 1.*: they are in radi'):
    check_pose(degrees)
  # One that can be used is not enough.
  some = [make_episode(), *[make_episode(states=np.full((20, 7), 9.0))] * 2]
  with pytest.raises(UserError, match='2 of 3 episodes of some that were'):
    check_pose(Episodes(some))
  with pytest.raises(UserError, match="state_kind 'joints' is not one of"):
    make_loader(folder, state_kind='joints')
  # In milliseconds there is no clip.
  arrays = dict(np.load(folder / '000.npz'))
  arrays['timestamps'] *= 1000
  np.savez(tmp_path / '000.npz', **arrays)
  loader = make_loader(tmp_path)
  with pytest.raises(UserError, match='1 of 1 .* less than 5 rows a second'):
    trajectories.fit_loader(loader)
  (tmp_path / 'none').mkdir()
  with pytest.raises(FileNotFoundError, match='NAME.npz beside NAME.mp4'):
    trajectories.open_trajectories(tmp_path / 'none')
  for changes, message in (
    ({'states': np.zeros((20, 2))}, '2 numbers of a state are no pose'),
    ({'timestamps': np.zeros(20)}, 'timestamps do not increase'),
    (
      {'states': np.full((20, 7), 400.0)},
      'a place .* 400.0: they are in met',
    ),
    (
      {'states': np.eye(20, 7)[:, ::-1] * 3},
      'a gripper .* 3.0: they are in',
    ),
  ):
    with pytest.raises(DecodeError, match=message):
      trajectories.check_episode(make_episode(**changes), 'pose')


def test_the_published_crop_is_that_of_the_centre():
  for sides, expected in (
    ((720, 1280), (0, 154, 720, 972)),
    ((480, 640), (0, 0, 480, 640)),
    ((256, 256), (0, 0, 256, 256)),
    ((400, 200), (66, 0, 267, 200)),
  ):
    assert transforms.crop_to_aspect(*sides) == expected
    rng = np.random.default_rng(0)
    drawn = transforms.random_resized_crop(*sides, scale=(1.777,) * 2, rng=rng)
    assert drawn == expected


def test_recorded_actions_go_with_hidden_states(tmp_path):
  folder = discs.write_discs_set(tmp_path, num_train=3) / 'train'
  options = dataclasses.replace(OPTIONS, frame_step=1, fps=None)
  loader = make_loader(folder, options, state_kind='hidden')
  stream = loader(0, (0, 0))['video']
  assert not stream['states'].any()
  found = stream['actions'][0]
  recorded = [loader.sources[0][i].actions for i in range(3)]
  assert any(
    np.array_equal(found, actions[i : i + 3])
    for actions in recorded
    for i in range(discs.FRAMES - 3)
  )
  # Without states the others have theirs, and measured actions.
  seen = make_loader(folder, options, state_kind='plain')(0, (0, 0))['video']
  np.testing.assert_array_equal(
    seen['actions'], np.diff(seen['states'], axis=1)
  )
  apart = dataclasses.replace(options, frame_step=2)
  with pytest.raises(DecodeError, match='in between would be left out'):
    make_loader(folder, apart, state_kind='hidden')._read(
      loader.sources[0][0], None
    )
  with pytest.raises(DecodeError, match='no recorded actions'):
    trajectories.check_episode(make_episode(), 'hidden')
