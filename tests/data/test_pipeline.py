"""The pipeline: what a run depends on, whatever hosts and workers do."""

import dataclasses
import itertools
import json
import os
import pathlib
import threading
import time

import numpy as np
import pytest
from variants import write_shard

from vjepa_jax.data import pipeline, sources, streams
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.features import FeatureSource
from vjepa_jax.data.readers import Journal
from vjepa_jax.data.records import Record, VideoFeatures, pack
from vjepa_jax.masks.fixed_size import build_mask_sampler

OPTIONS = ClipOptions(frames=4, resolution=32, frame_step=2)


def _loader(paths, options=OPTIONS, seed=0):
  masks = (
    build_mask_sampler(
      (2, 4, 4), 'future', dict(context_tokens=12, target_tokens=10)
    ),
  )
  opened = tuple(sources.open_source(str(path)) for path in paths)
  return pipeline.SampleLoader(opened, options, masks, seed)


def _take(loader, count, *, batch_size=4, weights=(1.0,), **options):
  dataset = pipeline.make_batches(
    loader, weights=weights, batch_size=batch_size, **options
  )
  iterator = iter(dataset)
  batches = list(itertools.islice(iterator, count))
  if options.get('num_workers'):
    iterator.close()
  return batches


def _list_failures(batches):
  return [
    (event['name'], event['reason'])
    for batch in batches
    for failure in batch['failures']
    for event in json.loads(str(failure))
  ]


def _assert_same(batches, others, rows=slice(None)):
  for a, b in zip(batches, others, strict=True):
    a, b = a['video'], b['video']
    np.testing.assert_array_equal(a['pixels'], b['pixels'][rows])
    for x, y in zip(a['masks'], b['masks'], strict=True):
      for name in ('context', 'target'):
        np.testing.assert_array_equal(x[name], y[name][rows])


def test_batches_hold_clips_and_masks(toy_videos):
  batch = _take(_loader([toy_videos]), 1)[0]
  pixels, (masks,) = batch['video']['pixels'], batch['video']['masks']
  assert pixels.shape == (4, 4, 32, 32, 3) and pixels.dtype == np.uint8
  assert masks['context'].shape == (4, 12)
  assert masks['target'].shape == (4, 10)
  # Samples differ, in content and in mask.
  assert (pixels[0] != pixels[1]).any()
  assert (masks['context'][0] != masks['context'][1]).any()
  assert not batch['failures'].size


def test_each_mask_spec_draws_masks_of_its_own(toy_videos):
  loader = _loader([toy_videos])
  (sampler,) = loader.mask_samplers
  twice = pipeline.SampleLoader(loader.sources, OPTIONS, (sampler, sampler), 0)
  first, second = twice(0, (0, 0))['video']['masks']
  for name in ('context', 'target'):
    assert (first[name] != second[name]).any()


@pytest.fixture
def broken_folder(toy_videos, tmp_path):
  """10 videos of which one each is broken in a way of its own."""
  originals = sorted(toy_videos.parent.glob('*.mp4'))[:10]
  for path in originals:
    (tmp_path / path.name).write_bytes(path.read_bytes())
  content = originals[0].read_bytes()
  broken = {
    'empty.mp4': b'',
    'garbage.mp4': b'this is no video' * 100,
    'cut.mp4': content[: len(content) // 2],
    'header.mp4': content[:64],
  }
  for name, data in broken.items():
    (tmp_path / name).write_bytes(data)
  return tmp_path, set(broken)


def test_batches_do_not_depend_on_threads_or_workers(broken_folder):
  loader = _loader([broken_folder[0]])
  expected = _take(loader, 6, num_threads=1)
  _assert_same(_take(loader, 6, num_threads=3), expected)
  found = _take(loader, 3, position=12, num_workers=2, num_threads=1)
  _assert_same(found, expected[3:])
  failures = [
    [batch['failures'].tolist() for batch in x[-3:]] for x in (found, expected)
  ]
  assert failures[0] == failures[1] and any(failures[0])


@dataclasses.dataclass(frozen=True)
class _Notes:
  """A loader of nothing, which notes in files which process loaded what."""

  folder: pathlib.Path
  seed: int = 0

  sources = (range(100),)
  num_clips = 2
  clip_bytes = 2**28
  journal = Journal()
  max_seconds = 60.0

  def __call__(self, position, key):
    (self.folder / str(position)).write_text(str(os.getpid()))
    return {'video': {'item': np.full(2, key[1])}, 'failures': []}


@pytest.mark.parametrize('workers', [0, 2])
def test_reads_ahead_as_many_clips_as_it_says(tmp_path, workers, caplog):
  caplog.set_level('INFO', 'absl')
  batches = iter(
    pipeline.make_batches(
      _Notes(tmp_path),
      weights=[1.0],
      batch_size=8,
      num_workers=workers,
      read_ahead=48,
    )
  )
  assert 'at most 48 clips, 12.00 GiB; batches of 8' in caplog.text
  for taken in (8, 16):
    next(batches)
    begin = time.monotonic()
    while 2 * len(list(tmp_path.iterdir())) < taken + 48:
      assert time.monotonic() < begin + 60
      time.sleep(0.01)
    time.sleep(0.2)  # It would go on.
    assert 2 * len(list(tmp_path.iterdir())) == taken + 48
  # No batch waits for one worker.
  processes = {(tmp_path / str(i)).read_text() for i in range(4)}
  assert len(processes) == max(workers, 1)
  batches.close()


def test_all_threads_read_the_first_batch(tmp_path):
  both = threading.Barrier(2)

  class Loader(_Notes):
    def __call__(self, position, key):
      both.wait(timeout=60)
      return super().__call__(position, key)

  _take(Loader(tmp_path), 1, batch_size=4, num_threads=2)


def test_read_ahead_has_a_least_size(tmp_path):
  loader = _Notes(tmp_path)
  _take(loader, 1, read_ahead=2)
  with pytest.raises(ValueError, match='read_ahead is 1 clips; .* need 2'):
    _take(loader, 1, read_ahead=1)
  with pytest.raises(ValueError, match='num_workers=3 and 2 .* need 30'):
    _take(loader, 1, read_ahead=29, num_workers=3)


def test_the_order_is_that_of_the_seed(tmp_path):
  def order(seed):
    batches = _take(_Notes(tmp_path, seed), 25, batch_size=8)
    return np.concatenate([batch['video']['item'] for batch in batches])

  assert (order(0) == order(0)).all()
  assert (order(0) != order(1)).any()


def test_what_is_random_follows_from_seed_and_position_alone():
  video = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)

  class Source(list):
    path = 'noise'

  source = Source([Record(video, -1, 'noise')])

  def load(position, seed=0):
    sampler = _loader([]).mask_samplers * 2
    loader = pipeline.SampleLoader((source,), OPTIONS, sampler, seed)
    stream = loader(position, (0, 0))['video']
    first, second = stream['masks']
    parts = stream['pixels'], first['target'], second['target']
    return [part.tobytes() for part in parts]

  for other in (load(1), load(0, seed=1)):
    assert all(a != b for a, b in zip(load(0), other, strict=True))
  assert load(1) == load(1)
  assert load(0)[1] != load(0)[2]  # each spec has a mask of its own


def test_hosts_together_read_what_one_host_reads(toy_videos):
  loader = _loader([toy_videos])
  expected = _take(loader, 3, batch_size=8)
  halves = [
    _take(loader, 3, batch_size=8, process_index=i, process_count=2)
    for i in range(2)
  ]
  for host, half in enumerate(halves):
    rows = slice(4 * host, 4 * host + 4)
    _assert_same(half, expected, rows)


@pytest.mark.parametrize('hosts', [1, 2])
def test_a_position_resumes_on_the_very_next_batch(toy_videos, hosts):
  loader = _loader([toy_videos])
  # 24 videos, batches of 8: the fourth begins another epoch.
  expected = _take(loader, 5, batch_size=8)
  resumed = _take(loader, 2, batch_size=8, position=24, process_count=hosts)
  _assert_same(resumed, expected[3:], rows=slice(8 // hosts))


def test_every_video_is_seen_once_an_epoch_in_a_new_order(toy_videos):
  seen = []
  loader = _loader([toy_videos])
  original = loader.sources[0]

  class Spy:
    path = original.path

    def __len__(self):
      return len(original)

    def __getitem__(self, index):
      seen.append(index)
      return original[index]

  spied = pipeline.SampleLoader((Spy(),), OPTIONS, loader.mask_samplers, 0)
  _take(spied, 12, num_threads=1)
  first, second = seen[:24], seen[24:48]
  assert sorted(first) == sorted(second) == list(range(24))
  assert first != second


def test_several_clips_a_video(toy_videos):
  options = ClipOptions(frames=4, resolution=32, frame_step=2, num_clips=2)
  batch = _take(_loader([toy_videos], options), 1)[0]
  assert batch['video']['pixels'].shape == (4, 4, 32, 32, 3)
  context = batch['video']['masks'][0]['context']
  assert (context[0] != context[1]).any()  # masks are a clip's, not a video's


def test_mixture_follows_its_weights(toy_videos, tmp_path):
  from vjepa_jax.sets.toy import write_toy_videos

  other = write_toy_videos(tmp_path, 4, seed=1)
  loader = _loader([toy_videos, other])
  index = streams.index_sources([24, 4], [0.75, 0.25], seed=0)
  drawn = [index[i][0] for i in range(400)]
  assert np.mean(drawn) == pytest.approx(0.25, abs=0.01)
  batch = _take(loader, 1, weights=(0.75, 0.25))[0]
  assert len(batch['video']['pixels']) == 4


def test_bad_videos_are_replaced_and_reported(broken_folder):
  folder, broken = broken_folder
  loader = _loader([folder])
  batches = _take(loader, 14, batch_size=2, num_threads=1)
  # Two passes over 14 videos meet each of the broken ones.
  failures = _list_failures(batches)
  assert {name for name, _ in failures} == broken
  assert all(reason for _, reason in failures)
  assert all(len(batch['video']['pixels']) == 2 for batch in batches)


def test_damaged_features_are_replaced_and_reported(tmp_path):
  path = tmp_path / 'f-00000-of-00001.array_record'
  features = [
    VideoFeatures(
      np.full((1, 8), i, np.float32), i, f'{i}', i, np.zeros((1, 2))
    )
    for i in range(4)
  ]
  video = pack(Record(b'video', 0, 'v.mp4'))
  write_shard(path, [b'junk', *map(pack, features), video])
  loader = pipeline.FeatureLoader((FeatureSource(str(tmp_path)),), 0, 4)
  assert loader.clip_bytes == 32
  batches = _take(loader, 3, batch_size=4)
  reasons = dict(_list_failures(batches))
  assert set(reasons) == {f'{path.name}[0]', f'{path.name}[5]'}
  assert 'hold videos, not features' in reasons[f'{path.name}[5]']
  for batch in batches:
    stream = batch['video']
    assert (stream['features'] == stream['label'][:, None, None]).all()


def test_damaged_records_are_replaced_and_reported(toy_videos, tmp_path):
  good = [
    Record(path.read_bytes(), 0, path.name)
    for path in sorted(toy_videos.parent.glob('*.mp4'))[:6]
  ]
  path = tmp_path / 'v-00000-of-00001.array_record'
  other = VideoFeatures(np.zeros((1, 8)), 0, 'features', 0, np.zeros((1, 2)))
  packed = [*map(pack, good), b'of another form' * 9, pack(other)]
  write_shard(path, packed)
  data = bytearray(path.read_bytes())
  begin = data.index(good[2].video) + 50
  data[begin : begin + 40] = bytes(40)
  path.write_bytes(data)
  loader = _loader([tmp_path])
  batches = _take(loader, 8, batch_size=2)
  failures = _list_failures(batches)
  # Two passes over 8 records meet each of the damaged ones.
  reasons = {name.removeprefix(path.name): why for name, why in failures}
  assert set(reasons) == {'[2]', '[6]', '[7]'}
  assert 'hash mismatch' in reasons['[2]']
  assert 'not a record' in reasons['[6]'] and 'features' in reasons['[7]']


def test_errors(toy_videos, tmp_path):
  loader = _loader([toy_videos])
  with pytest.raises(ValueError, match='batch size 6 is not divisible by 4 h'):
    _take(loader, 1, batch_size=6, process_count=4)
  with pytest.raises(ValueError, match='exactly one of frame_step and fps'):
    ClipOptions(frame_step=4, fps=4.0)
  (tmp_path / 'bad.mp4').write_bytes(b'no video')
  with pytest.raises(RuntimeError, match='100 videos in a row .* bad.mp4: '):
    _loader([tmp_path])(0, (0, 0))
