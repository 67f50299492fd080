"""Each sub-command from end to end at toy size; no time decides a test."""

import json

import numpy as np
import pytest

from vjepa_jax.bench import compilation, data, videos
from vjepa_jax.bench.__main__ import main
from vjepa_jax.data import storage
from vjepa_jax.data.decode import open_video


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('bench')


def _run(tmp_path, *arguments):
  path = tmp_path / 'result.json'
  assert main([*arguments, '--quick', f'--json={path}']) == 0
  result = json.loads(path.read_text())
  assert result.keys() >= {'ratio', 'ours', 'peer', 'machine'}
  assert result['machine'].keys() >= {'cores', 'load', 'python', 'jax'}
  return result


def test_step(tmp_path, capsys):
  pytest.importorskip('torch', reason='needs the extra parity')
  result = _run(tmp_path, 'step', '--batch_size=2', '--rounds=5')
  assert result['ratio'].keys() == {'torch'}
  assert 'ours / torch' in capsys.readouterr().out
  # Both learn, and the same: a wrong optimizer, mask or target would show.
  ours, theirs = result['losses']['ours'], result['losses']['torch']
  assert len(ours) == 6
  assert ours[0] - ours[-1] > 1e-3
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  assert result['largest_relative_loss_difference'] < 1e-5


def test_data(tmp_path, folder, capsys):
  result = _run(
    tmp_path, 'data', f'--folder={folder}', '--step_seconds=0.01',
    '--batch_size=2',
  )  # fmt: skip
  cases = [str(encoding) for encoding in videos.TOY_ENCODINGS]
  assert list(result['cases']) == cases
  for case in result['cases'].values():
    assert case['ours']['median'] > 0
    assert case['ratio'].keys() == result['ratio'].keys()
  assert list(result['workers']) == ['0', '1', '2']
  for worker in result['workers'].values():
    assert worker['clips_per_second'] > 0
    assert 0 <= worker['wait_share'] <= 1
  assert cases[0] in capsys.readouterr().out
  # What was encoded has the size and the keyframes that it is named after, and
  # all read the same frames of it.
  readers = data.make_readers()
  for encoding in videos.TOY_ENCODINGS:
    paths = storage.match(f'{folder}/*_g{encoding.gop}.mp4')
    assert len(paths) == 2
    with open_video(paths[0]) as video:
      assert (video.height, video.width) == (64, 96)
      assert video.num_frames == 72
      assert len(video._index.key_pts) == -(-72 // encoding.gop)
    clip = data.Clip(paths[0], np.arange(5, 37, 2), (4, 6, 50, 60), (32, 32))
    ours = readers['ours'](clip).astype(float)
    assert ours.shape == (16, 32, 32, 3)
    others = readers['ours'](clip._replace(indices=clip.indices + 1))
    bound = np.abs(others - ours).mean() / 2
    for name, read in readers.items():
      assert np.abs(read(clip) - ours).mean() < min(bound, 4), name


def test_a_peer_that_cannot_be_loaded_is_named(capsys, monkeypatch):
  def fail(module):
    if module == 'decord':
      raise ImportError
    raise RuntimeError('Could not load libtorchcodec.\nFFmpeg version 7: ...')

  monkeypatch.setattr(data, 'import_module', fail)
  assert list(data.make_readers()) == ['ours']
  assert capsys.readouterr().err.splitlines() == [
    "decord is left out: pip install -e '.[bench]'",
    'torchcodec is left out: it finds no FFmpeg libraries '
    '(apt-get install ffmpeg)',
  ]


def test_masks(tmp_path, folder):
  result = _run(tmp_path, 'masks', f'--folder={folder}')
  names = {name.split()[1] for name in result['cases']}
  assert names >= {'short', 'long', 'tube', 'future', 'past', 'either', 'both'}
  both = [
    result['cases'][f'vjepa1:l16 {name}']['ratio']['decode']
    for name in ('short', 'long')
  ]
  assert result['ratio']['decode'] == pytest.approx(sum(both))


def test_compile(tmp_path, monkeypatch):
  seconds = iter([8.0, 2.0, 10.0, 5.0])
  caches = []

  def start(config, workdir, cache=None):
    caches.append(cache)
    if cache is None:
      (workdir / 'compilation_cache').mkdir(parents=True)
      (workdir / 'compilation_cache' / 'program').touch()
    return next(seconds)

  monkeypatch.setattr(compilation, 'time_first_step', start)
  result = _run(tmp_path, 'compile', '--rounds=2')
  assert result['ratio'] == {'cold': 0.375}
  assert caches[0] is None
  assert caches[1].parent.name == 'cold_0'
  assert caches[3].parent.name == 'cold_1'


def test_finds_the_first_step_in_whole_lines_only(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert not compilation.has_first_step(path)
  path.write_text('{"step": 0, "probe_knn": 0.1}\n{"step": 1, "loss": 1}')
  assert not compilation.has_first_step(path)
  path.write_text('{"step": 0, "probe_knn": 0.1}\n{"step": 1, "loss": 1}\n')
  assert compilation.has_first_step(path)


@pytest.mark.slow
def test_compile_for_real(tmp_path):
  result = _run(tmp_path, 'compile')
  assert result['ours']['median'] > 0


def test_a_run_that_does_not_start_is_told(capsys):
  assert main(['compile', '--quick', '--config=configs/none.py']) == 2
  assert 'configs/none.py did not start' in capsys.readouterr().err
