"""Images beside videos: each stream is what it would be alone."""

import dataclasses

from killers import Killer, Killers
import numpy as np
from PIL import Image
import pytest
from test_pipeline import _list_failures, _loader, _take

from vjepa_jax.data import pipeline, sources
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.readers import open_journal
from vjepa_jax.data.streams import Stream
from vjepa_jax.masks.fixed_size import build_mask_sampler


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """A folder of nine images, and one that is damaged."""
  folder = tmp_path_factory.mktemp('images')
  rng = np.random.default_rng(0)
  for i in range(9):
    pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')
  (folder / 'damaged.png').write_bytes((folder / '0.png').read_bytes()[:99])
  return folder


def _make_image_loader(folder):
  sampler = build_mask_sampler(
    (1, 2, 2), 'random', dict(ratio=0.5, context_tokens=2, target_tokens=2)
  )
  return pipeline.SampleLoader(
    (sources.open_source(str(folder)),),
    ClipOptions(frames=1, resolution=16, frame_step=1),
    (sampler,),
    seed=7,
    name='image',
  )


def _take_both(videos, images, count, position=0, **options):
  beside = Stream(_make_image_loader(images), (1.0,), 12, 12 * position)
  return _take(
    _loader([videos]),
    count,
    position=4 * position,
    beside=[beside],
    **options,
  )


def _assert_equal(found, expected, rows=slice(None)):
  assert sorted(found) == sorted(expected) == ['masks', 'pixels']
  np.testing.assert_array_equal(found['pixels'], expected['pixels'][rows])
  for a, b in zip(found['masks'], expected['masks'], strict=True):
    for name, ids in a.items():
      np.testing.assert_array_equal(ids, b[name][rows])


@pytest.mark.parametrize(
  'workers', [0, pytest.param(2, marks=pytest.mark.slow)]
)
def test_streams_are_what_they_are_alone(toy_videos, images, workers):
  expected = {
    'video': _take(_loader([toy_videos]), 3),
    'image': _take(_make_image_loader(images), 3, batch_size=12),
  }
  assert expected['image'][0]['image']['pixels'].shape == (12, 1, 16, 16, 3)
  # The second and third batch, as of a run that goes on.
  found = _take_both(toy_videos, images, 2, position=1, num_workers=workers)
  for batch, i in zip(found, (1, 2), strict=True):
    assert sorted(batch) == ['failures', 'image', 'video']
    for name, batches in expected.items():
      _assert_equal(batch[name], batches[i][name])
  failures = _list_failures(found)
  assert {name for name, _ in failures} == {'damaged.png'}
  assert failures == _list_failures(expected['image'][1:])


def test_hosts_share_both_streams(toy_videos, images):
  whole = _take_both(toy_videos, images, 2)
  for host in range(2):
    part = _take_both(
      toy_videos, images, 2, process_index=host, process_count=2
    )
    for batch, expected in zip(part, whole, strict=True):
      for name, count in (('video', 2), ('image', 6)):
        rows = slice(count * host, count * (host + 1))
        _assert_equal(batch[name], expected[name], rows)
  with pytest.raises(ValueError, match='batch size 12 is not divisible by 8 h'):
    _take_both(toy_videos, images, 1, process_count=8, batch_size=8)


@pytest.mark.slow
def test_an_image_that_kills_its_reader_is_excluded(
  toy_videos, images, tmp_path
):
  loader = _make_image_loader(images)
  killers = Killers(loader.sources[0], {4: Killer(b'v')})
  loader = dataclasses.replace(loader, sources=(killers,))
  videos = dataclasses.replace(
    _loader([toy_videos]), journal=open_journal(str(tmp_path), 0)
  )
  beside = [Stream(loader, (1.0,), 12)]
  found = _take(videos, 2, beside=beside, num_workers=1, num_threads=1)
  (line,) = (tmp_path / 'exclude.txt').read_text().splitlines()
  assert line.endswith(': 4.png')
  for batch, expected in zip(found, _take(videos, 2), strict=True):
    _assert_equal(batch['video'], expected['video'])
