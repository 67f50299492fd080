"""Features of videos in shards: the command, and what it leaves behind."""

import dataclasses
import json

from commands import run_command, start_command
import jax
import numpy as np
import pytest

import vjepa_jax
from vjepa_jax.data import sources
from vjepa_jax.data.clip import ClipOptions, load_clips, read_clips
from vjepa_jax.data.features import FeatureSource
from vjepa_jax.evaluation import batching, extraction, probing
from vjepa_jax.interop.layout import Weights
from vjepa_jax.models import zoo
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.tools import convert, engine, extract, prepare

OPTIONS = ClipOptions(frames=4, resolution=32, frame_step=2, num_clips=3)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('backbone')
  encoder = zoo.build_encoder('nano', tubelet=(2, 8, 8))
  video = np.zeros((1, 4, 32, 32, 3), np.uint8)
  params = jax.jit(encoder.init)(jax.random.key(0), video)['params']
  weights = Weights(encoder, params, resolution=32, frames=4)
  convert.write_workdir(path, weights)
  return path


@pytest.fixture(scope='module')
def model(workdir):
  return vjepa_jax.load(workdir)


@pytest.fixture(scope='module')
def manifest(toy_videos, tmp_path_factory):
  """Eleven videos with labels, two of which cannot be read."""
  path = tmp_path_factory.mktemp('videos') / 'list.csv'
  lines = toy_videos.read_text().splitlines()[:9]
  lines = [f'{toy_videos.parent}/{line}' for line in lines]
  lines.insert(2, 'missing.mp4 1')
  lines.insert(7, f'{__file__} 2')
  path.write_text('\n'.join(lines) + '\n')
  return path


def _extract(manifest, output, model, params=None, clip=OPTIONS, **options):
  defaults = dict(num_shards=3, batch_size=8, num_threads=2)
  return extraction.extract(
    sources.open_source(str(manifest)),
    str(output),
    model.encoder,
    params or model.params,
    clip,
    **defaults | options,
  )


@pytest.fixture(scope='module')
def whole(manifest, model, tmp_path_factory):
  """The features of an uninterrupted run."""
  path = tmp_path_factory.mktemp('whole')
  assert _extract(manifest, path, model) == (11, 2)
  return path


def _read_files(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_features_are_those_of_the_model(manifest, model, whole):
  source = sources.open_source(str(manifest))
  features = FeatureSource(str(whole))
  good = [i for i in range(11) if i not in (2, 7)]
  assert [video.index for video in features] == good
  for video in features:
    record = source[video.index]
    assert (video.name, video.label) == (record.name, record.label)
    expected = model.encode(read_clips(record, OPTIONS))
    assert video.features.dtype == np.float16
    assert video.features.shape == (3, 32, 48)
    np.testing.assert_allclose(video.features, expected, atol=3e-3)
    # Three parts of 8 of the 24 frames, 10 a second.
    np.testing.assert_allclose(video.times[:, 0], [0.0, 0.8, 1.6], atol=1e-3)
    np.testing.assert_allclose(video.times[:, 1], [0.7, 1.5, 2.3], atol=1e-3)
  lines = (whole / 'quarantine.jsonl').read_text().splitlines()
  assert [(e['name'], e['shard']) for e in map(json.loads, lines)] == [
    ('missing.mp4', 0),
    (__file__, 2),
  ]


def test_pooled_features_are_the_mean(manifest, model, whole, tmp_path):
  _extract(manifest, tmp_path, model, pool='mean', dtype='float32')
  assert probing.load_features(str(tmp_path))[0].shape == (9, 3 * 48)
  pooled = FeatureSource(str(tmp_path))[4]
  assert pooled.features.dtype == np.float32
  np.testing.assert_allclose(
    pooled.features,
    FeatureSource(str(whole))[4].features.astype(np.float32).mean(axis=1),
    atol=1e-3,
  )


def test_probes_score_cached_features_as_they_score_videos(
  toy_videos, model, tmp_path
):
  clip = dataclasses.replace(OPTIONS, num_clips=1)
  _extract(toy_videos, tmp_path, model, clip=clip, dtype='float32')
  cached, labels = probing.load_features(str(tmp_path))
  source = sources.open_source(str(toy_videos))
  clips = load_clips(source, OPTIONS, labelled=True)
  extract = batching.make_extract(
    batching.apply_encoder(model.encoder), make_mesh(), 8, 'batch size'
  )
  direct = extract(jax.device_get(model.params), clips.videos)
  np.testing.assert_array_equal(labels, clips.labels)
  np.testing.assert_allclose(cached, direct, atol=1e-5)
  for score in (probing.score_knn, probing.score_linear):
    scores = [
      score(x[:16].mean(1), labels[:16], x[16:].mean(1), labels[16:])
      for x in (cached, direct)
    ]
    assert scores[0] == scores[1]


def test_features_of_unlabelled_videos_make_no_probe(
  toy_videos, model, tmp_path
):
  folder = tmp_path / 'videos'
  folder.mkdir()
  (folder / 'a.mp4').symlink_to(toy_videos.parent / '0000.mp4')
  _extract(folder, tmp_path / 'out', model, num_shards=1)
  with pytest.raises(ValueError, match='a.mp4 has no label'):
    probing.load_features(str(tmp_path / 'out'))
  source, shards = sources.open_source(str(folder)), str(tmp_path / 'shards')
  prepare.prepare(source, shards, None, shard_size=1, num_workers=0)
  with pytest.raises(ValueError, match='hold videos, not features'):
    FeatureSource(shards)


def test_an_interrupted_run_ends_with_the_same_files(
  manifest, model, whole, tmp_path, monkeypatch
):
  read = extraction._read

  def stop(reader, index):
    if index == 9:
      raise KeyboardInterrupt
    return read(reader, index)

  monkeypatch.setattr(extraction, '_read', stop)
  with pytest.raises(KeyboardInterrupt):
    _extract(manifest, tmp_path, model)
  kept = tmp_path / 'features-00000-of-00003.array_record'
  names = {path.name for path in tmp_path.glob('*.array_record')}
  assert kept.name in names and len(names) < 3
  with pytest.raises(ValueError, match='of 3 shards are missing, the first is'):
    FeatureSource(str(tmp_path))
  before = kept.stat().st_mtime_ns
  monkeypatch.setattr(extraction, '_read', read)
  assert _extract(manifest, tmp_path, model) == (11, 2)
  assert kept.stat().st_mtime_ns == before
  assert _read_files(tmp_path) == _read_files(whole)
  # Nothing is left to do, and nothing is decoded.
  monkeypatch.setattr(extraction, '_read', lambda *_: pytest.fail('decodes'))
  assert _extract(manifest, tmp_path, model) == (11, 2)


def test_what_killed_an_earlier_run_is_left_out(manifest, model, tmp_path):
  (tmp_path / 'exclude.txt').write_text('missing.mp4\n')
  assert _extract(manifest, tmp_path, model) == (11, 2)
  lines = (tmp_path / 'quarantine.jsonl').read_text().splitlines()
  assert json.loads(lines[0])['reason'] == 'excluded, it killed its reader'
  assert not list(tmp_path.glob('reading*'))


def test_two_hosts_write_what_one_writes(manifest, model, whole, tmp_path):
  counts = [
    _extract(manifest, tmp_path, model, host_index=i, num_hosts=2)
    for i in (1, 0)
  ]
  assert counts == [(4, 0), (7, 2)]
  assert _read_files(tmp_path) == _read_files(whole)


def test_other_weights_or_options_are_refused(manifest, model, whole, tmp_path):
  changed = jax.tree.map(lambda x: x + 1e-3, model.params)
  with pytest.raises(ValueError, match='other options .*params_sha256 was'):
    _extract(manifest, whole, model, changed)
  with pytest.raises(ValueError, match='dtype was float16 and is now float32'):
    _extract(manifest, whole, model, dtype='float32')
  with pytest.raises(ValueError, match='batch_size 9 is not divisible by 8'):
    _extract(manifest, tmp_path, model, batch_size=9)
  with pytest.raises(ValueError, match='every host needs a shard'):
    _extract(manifest, tmp_path, model, host_index=0, num_hosts=4)
  with pytest.raises(ValueError, match='features of .* not videos'):
    sources.open_source(str(whole))[0]


def test_features_that_are_not_finite_are_an_error(manifest, model, tmp_path):
  broken = jax.tree.map(lambda x: x * np.nan, model.params)
  with pytest.raises(ValueError, match='0000.mp4 are not finite in float16'):
    _extract(manifest, tmp_path, model, broken)


def test_command(manifest, model, workdir, whole, tmp_path):
  arguments = [
    f'--backbone={workdir}',
    f'--input={manifest}',
    f'--output={tmp_path}',
    '--segments=3',
    '--batch_size=8',
  ]
  done = start_command(
    'extract', *arguments, '--frame_step=2', '--compute_dtype=bfloat16'
  )
  assert done.returncode == 0, done.stderr
  assert 'features of 9 videos are in' in done.stdout
  assert 'left out 2, listed in' in done.stdout
  # bfloat16 shows that the flag came through, and how little it costs.
  ours = np.stack([video.features for video in FeatureSource(str(tmp_path))])
  wanted = np.stack([video.features for video in FeatureSource(str(whole))])
  error = np.abs(ours.astype(np.float32) - wanted)
  assert 1e-3 < error.max() < 0.2
  # A step of 4, the published, is another set of clips.
  wrong = start_command('extract', *arguments, '--compute_dtype=bfloat16')
  assert wrong.returncode == 2
  assert wrong.stderr.strip().splitlines()[-1].startswith('error: ')
  assert 'frame_step was 2 and is now 4' in wrong.stderr


@pytest.mark.slow
def test_beam_writes_what_one_machine_writes(manifest, workdir, tmp_path):
  pytest.importorskip('apache_beam', reason='the extra beam has it')
  arguments = [
    f'--backbone={workdir}',
    f'--input={manifest}',
    *('--frame_step=2', '--shards=3', '--batch_size=8'),
  ]
  done = start_command('extract', *arguments, f'--output={tmp_path / "one"}')
  assert done.returncode == 0, done.stderr
  beam = '--direct_running_mode=multi_processing --direct_num_workers=2'
  arguments += [f'--output={tmp_path / "two"}', '--engine=beam']
  done = start_command('extract', *arguments, f'--beam={beam}')
  assert done.returncode == 0, done.stderr
  assert 'features of 9 videos are in' in done.stdout
  assert _read_files(tmp_path / 'two') == _read_files(tmp_path / 'one')
  (tmp_path / 'bad').mkdir()
  for name in ('a.mp4', 'b.mp4'):
    (tmp_path / 'bad' / name).touch()
  arguments += [f'--input={tmp_path / "bad"}', f'--output={tmp_path / "three"}']
  done = start_command('extract', *arguments, '--shards=1')
  assert done.returncode == 2
  assert 'none of 2 videos could be read' in done.stderr.splitlines()[-1]


def test_hosts_of_one_program_know_their_number(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.delenv('SLURM_ARRAY_TASK_ID', raising=False)
  found = []
  monkeypatch.setattr(
    engine,
    'spread',
    lambda _, options: found.append(engine.find_host(options)),
  )
  flags = '--backbone=x', '--input=x', '--output=x'
  run_command(extract, *flags)
  run_command(extract, *flags, '--host_index=0', '--num_hosts=3')
  assert found == [(1, 2), (0, 3)]
