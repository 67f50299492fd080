"""Shards of episodes: what training reads of them is what it read before."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.data import episodes
from vjepa_jax.data import robots, shards, trajectories
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.records import Record, pack
from vjepa_jax.data.video import DecodeError
from vjepa_jax.errors import UserError
from vjepa_jax.interop import load
from vjepa_jax.interop.layout import Weights
from vjepa_jax.models import zoo
from vjepa_jax.tools import prepare_episodes

OPTIONS = ClipOptions(frames=4, resolution=16, fps=5.0, frame_step=None)


def run(source, output, **changes):
  options = dict(
    input=str(source), output=str(output), camera='', resolution=16, fps=None,
    backbone=None, which='target_encoder', batch_size=8, shards=2,
    num_threads=2, host_index=None, num_hosts=None, engine='hosts',
  )  # fmt: skip
  prepare_episodes.main(SimpleNamespace(**options | changes))
  return trajectories.open_trajectories(output)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = episodes.write_episodes(tmp_path_factory.mktemp('episodes'), 5)
  (folder / '003.mp4').write_bytes(b'no')
  return folder


def test_films(folder, tmp_path, capsys):
  source = run(folder, tmp_path / 'films')
  assert 'left out 1, listed in' in capsys.readouterr().out
  assert isinstance(source, robots.EpisodeShards) and len(source) == 4
  before = trajectories.open_trajectories(folder)
  samples = [
    trajectories.TrajectoryLoader((x,), OPTIONS, 0, extrinsics=True)(1, (0, 2))
    for x in (before, source)
  ]
  ours, theirs = (sample['video'] for sample in samples)
  for name in ('states', 'actions', 'extrinsics'):
    np.testing.assert_array_equal(ours[name], theirs[name])
  np.testing.assert_allclose(
    ours['pixels'].astype(int), theirs['pixels'].astype(int), atol=3
  )
  # Rows are left out, and none is shown at another time than it was.
  few = run(folder, tmp_path / 'few', fps=5.0)[0]
  assert len(few.timestamps) == len(few.states) == 10
  assert set(few.timestamps) <= set(before[0].timestamps)
  # The same command goes on; other options do not.
  run(folder, tmp_path / 'films')
  with pytest.raises(UserError, match='resolution was 16 and is now 24'):
    run(folder, tmp_path / 'films', resolution=24)
  with pytest.raises(UserError, match='--shards=9 of 5 episodes'):
    run(folder, tmp_path / 'none', shards=9)


@pytest.mark.slow
def test_features(folder, tmp_path, monkeypatch):
  encoder = zoo.build_encoder('nano', tubelet=(2, 8, 8))
  params = jax.jit(encoder.init)(
    jax.random.key(0), np.zeros((1, 2, 16, 16, 3), np.uint8)
  )['params']
  weights = Weights(encoder, params, resolution=16, frames=2)
  monkeypatch.setattr(load, 'read_weights', lambda *_, **__: weights)
  source = run(folder, tmp_path, backbone='it')
  episode = source[0]
  assert episode.video.shape == (20, 2, 2, 48)
  clip = ClipOptions(resolution=16)
  original = trajectories.open_trajectories(folder)[0]
  frames = trajectories.read_frames(original, np.arange(20), clip)
  expected = encoder.apply({'params': params}, frames[7][None])
  np.testing.assert_allclose(
    episode.video[7].reshape(4, 48), expected[0], atol=1e-2
  )
  loader = trajectories.TrajectoryLoader((source,), OPTIONS, 0)
  assert loader(0, (0, 0))['video']['features'].shape == (1, 4, 2, 2, 48)


def test_shards_of_videos_are_refused(tmp_path):
  (path,) = shards.name_shards(str(tmp_path), 'videos', 1)
  record = pack(Record(b'film', 0, 'it'))
  shards.write_shards(
    [path], [range(1)], [0], lambda _: [[record]], f'{tmp_path}/bad'
  )
  with pytest.raises((UserError, DecodeError), match='hold no episodes'):
    trajectories.open_trajectories(tmp_path)
