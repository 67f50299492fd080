"""Cutting clips, and loading many of them."""

import dataclasses

import numpy as np
import pytest

from vjepa_jax.data import clip, decode, pipeline, sources, transforms
from vjepa_jax.data.records import Record
from vjepa_jax.errors import UserError

OPTIONS = clip.ClipOptions(frames=4, resolution=32, frame_step=2)


def test_views_are_those_of_reads_box_by_box(toy_videos):
  record = sources.open_source(str(toy_videos))[3]
  options = clip.ClipOptions(4, 32, 2, num_clips=2, views=3)
  clips, times = clip.read_timed_clips(record, options)
  assert clips.shape == (6, 4, 32, 32, 3) and times.shape == (2, 4)
  with decode.open_video(record.video) as video:
    boxes = transforms.spread_crops(video.height, video.width, 3)
    for i, part in enumerate(times):
      indices = np.searchsorted(video.times, part)
      for view, box in zip(clips[3 * i : 3 * i + 3], boxes, strict=True):
        expected = video.read(indices, box, (32, 32))
        np.testing.assert_array_equal(view, expected)


def test_training_draws_time_crop_and_flip():
  # Each pixel says which frame, column and row it is of.
  shape = (60, 72, 96)
  video = np.stack(np.indices(shape)[[0, 2, 1]], -1).astype(np.uint8)
  record = Record(video, -1, 'indices')
  options = clip.ClipOptions(4, 48, 2)
  starts, lefts, tops, widths, flips = [], [], [], [], []
  for seed in range(300):
    drawn = clip.read_clips(record, options, np.random.default_rng(seed))[0]
    frames, columns, rows = np.moveaxis(drawn.astype(int), -1, 0)
    starts.append(frames[0, 0, 0])
    flips.append(columns[0, 0, 0] > columns[0, 0, -1])
    first, last = columns.min(), columns.max()
    widths.append(last + 1 - first)
    lefts.append(first / max(96 - widths[-1], 1))
    tops.append(rows.min() / max(71 - rows.max() + rows.min(), 1))
    # One box for the whole clip.
    assert (columns == columns[:1]).all() and (rows == rows[:1]).all()
  assert min(starts) == 0 and max(starts) == 51 and len(set(starts)) > 45
  assert 0.45 < np.mean(flips) < 0.55
  for at in (lefts, tops):
    assert np.ptp(at) > 0.9 and 0.4 < np.mean(at) < 0.6
  assert min(widths) < 50 and max(widths) > 85
  plain, mirrored = (
    clip.read_clips(
      record,
      dataclasses.replace(options, flip=flip),
      np.random.default_rng(0),
    )
    for flip in (0.0, 1.0)
  )
  np.testing.assert_array_equal(plain, mirrored[..., ::-1, :])


def test_windows_follow_each_other(toy_videos):
  path = sources.open_source(str(toy_videos))[0].video
  windows = clip.read_windows(path, OPTIONS, limit=0)
  # 24 frames, 10 a second: three windows of 8 frames.
  assert windows.names == ('0.0 s', '0.8 s', '1.6 s')
  for start, expected in zip((0.0, 0.8, 1.6), windows.videos, strict=True):
    found, rate = clip.read_from(path, OPTIONS, start)
    np.testing.assert_array_equal(found, expected)
    assert rate == pytest.approx(5)
  assert len(clip.read_windows(path, OPTIONS, limit=2).videos) == 2
  with pytest.raises(decode.DecodeError, match='4 frames from 2.00 s on take'):
    clip.read_from(path, OPTIONS, 2.0)


def test_loads_names_labels_and_failures(toy_videos, tmp_path):
  lines = toy_videos.read_text().splitlines()[:5]
  lines = [f'{toy_videos.parent}/{line}' for line in lines]
  manifest = tmp_path / 'list.csv'
  manifest.write_text('\n'.join(['missing.mp4 1', *lines]))
  source = sources.open_source(str(manifest))
  clips = clip.load_clips(source, OPTIONS, labelled=True)
  assert clips.labels.tolist() == [0, 1, 2, 3, 0]
  assert clips.names == tuple(line.split()[0] for line in lines)
  assert clips.failures == (
    {'name': 'missing.mp4', 'reason': 'file does not exist'},
  )
  np.testing.assert_array_equal(
    clips.videos[1], clip.read_clips(source[2], OPTIONS)[0]
  )
  # A fixed random subset, in the order of the source.
  few = clip.load_clips(source, OPTIONS, limit=3)
  again = clip.load_clips(source, OPTIONS, limit=3)
  assert few.names == again.names and len(few.names) + len(few.failures) == 3
  long = clip.ClipOptions(frames=16, resolution=32, frame_step=2)
  with pytest.raises(ValueError, match='none of 6 videos could be used'):
    clip.load_clips(source, long, whole=True)
  assert len(clip.load_clips(source, long).videos) == 5
  folder = sources.open_source(str(toy_videos.parent))
  with pytest.raises(ValueError, match='has no label, a probe needs one'):
    clip.load_clips(folder, OPTIONS, labelled=True)


def test_a_source_may_have_a_rate_and_frames_of_its_own(toy_videos):
  source = sources.Subset(sources.open_source(str(toy_videos)), [3])
  record = source[0]
  own = clip.adapt_options(OPTIONS, {'path': 'a', 'fps': 5.0, 'frames': 2})
  assert (own.fps, own.frame_step, own.frames) == (5.0, None, 4)
  (found,) = clip.read_clips(record, own)
  (two,) = clip.read_clips(record, clip.ClipOptions(2, 32, None, 5.0))
  np.testing.assert_array_equal(found, two[[0, 0, 1, 1]])
  assert clip.adapt_options(OPTIONS, {'path': 'a', 'fps': None}) == (
    dataclasses.replace(OPTIONS, distinct=4)
  )
  # What is drawn of a source is cut as it says.
  loader = pipeline.SampleLoader((source,) * 2, OPTIONS, (), 0)
  rows = [loader(0, (i, 0))['video']['pixels'] for i in range(2)]
  np.testing.assert_array_equal(*rows)
  loader = dataclasses.replace(loader, source_options=(OPTIONS, own))
  first, second = (loader(0, (i, 0))['video']['pixels'][0] for i in range(2))
  np.testing.assert_array_equal(first, rows[0][0])
  np.testing.assert_array_equal(second[::2], second[1::2])
  with pytest.raises(UserError, match='a: its frames=3 do not divide the 4'):
    clip.adapt_options(OPTIONS, {'path': 'a', 'frames': 3})
  with pytest.raises(UserError, match='a: set exactly one'):
    clip.adapt_options(OPTIONS, {'path': 'a', 'fps': 5.0, 'frame_step': 2})
