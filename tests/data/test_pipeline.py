"""The pipeline: what a run depends on, whatever hosts and workers do."""

import itertools
import json

import numpy as np
import pytest

from vjepa_jax.data import pipeline, sources
from vjepa_jax.data.clip import ClipOptions
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


def _assert_same(batches, others, rows=None):
  for a, b in zip(batches, others, strict=True):
    a, b = a['video'], b['video']
    np.testing.assert_array_equal(a['pixels'], b['pixels'][:rows])
    for x, y in zip(a['masks'], b['masks'], strict=True):
      for name in ('context', 'target'):
        np.testing.assert_array_equal(x[name], y[name][:rows])


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


def test_batches_do_not_depend_on_threads_or_workers(toy_videos):
  loader = _loader([toy_videos])
  expected = _take(loader, 6, num_threads=1)
  _assert_same(_take(loader, 6, num_threads=3), expected)
  _assert_same(_take(loader, 6, num_workers=2, num_threads=1), expected)


def test_hosts_together_read_what_one_host_reads(toy_videos):
  loader = _loader([toy_videos])
  expected = _take(loader, 3, batch_size=8)
  halves = [
    _take(loader, 3, batch_size=8, process_index=i, process_count=2)
    for i in range(2)
  ]
  joined = map(pipeline._concatenate, zip(*halves, strict=True))
  _assert_same(joined, expected)


@pytest.mark.parametrize('hosts,workers', [(1, 0), (1, 2), (2, 0)])
def test_a_position_resumes_on_the_very_next_batch(toy_videos, hosts, workers):
  loader = _loader([toy_videos])
  # 24 videos, batches of 8: the fourth begins another epoch.
  expected = _take(loader, 5, batch_size=8)
  options = dict(process_count=hosts, num_workers=workers)
  resumed = _take(loader, 2, batch_size=8, position=24, **options)
  _assert_same(resumed, expected[3:], rows=8 // hosts)


def test_every_video_is_seen_once_an_epoch_in_a_new_order(toy_videos):
  seen = []
  loader = _loader([toy_videos])
  original = loader.sources[0]

  class Spy:
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
  index = pipeline._index([24, 4], [0.75, 0.25], seed=0)
  drawn = [index[i][0] for i in range(400)]
  assert np.mean(drawn) == pytest.approx(0.25, abs=0.01)
  batch = _take(loader, 1, weights=(0.75, 0.25))[0]
  assert len(batch['video']['pixels']) == 4


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


def test_bad_videos_are_replaced_and_reported(broken_folder):
  folder, broken = broken_folder
  loader = _loader([folder])
  batches = _take(loader, 14, batch_size=2, num_threads=1)
  events = [
    event
    for batch in batches
    for failure in batch['failures']
    for event in json.loads(str(failure))
  ]
  # Two passes over 14 videos meet each of the broken ones.
  assert {event['name'] for event in events} == broken
  assert all(event['reason'] for event in events)
  assert all(len(batch['video']['pixels']) == 2 for batch in batches)
  _assert_same(_take(loader, 14, batch_size=2, num_workers=2), batches)


def test_errors(toy_videos, tmp_path):
  loader = _loader([toy_videos])
  with pytest.raises(ValueError, match='batch size 6 is not divisible by 4 h'):
    _take(loader, 1, batch_size=6, process_count=4)
  with pytest.raises(ValueError, match='exactly one of frame_step and fps'):
    ClipOptions(frame_step=4, fps=4.0)
  (tmp_path / 'bad.mp4').write_bytes(b'no video')
  with pytest.raises(RuntimeError, match='100 videos in a row .* bad.mp4: '):
    _loader([tmp_path])(0, (0, 0))
