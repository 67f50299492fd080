"""Tests of frame sampling."""

import numpy as np
import pytest

from vjepa_jax.data.sampling import sample_frames


def _times(num_frames: int, fps: float = 30.0) -> np.ndarray:
  return np.arange(num_frames) / fps


def test_published_window_at_step_four():
  frames = sample_frames(_times(300), 16, frame_step=4)
  expected = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
  assert frames.dtype == np.int64
  np.testing.assert_array_equal(frames, [expected])


def test_step_one_is_consecutive():
  rng = np.random.default_rng(0)
  for _ in range(50):
    frames = sample_frames(_times(90), 16, frame_step=1, rng=rng)[0]
    np.testing.assert_array_equal(frames, frames[0] + np.arange(16))


def test_one_clip_in_each_part():
  for rng in (None, np.random.default_rng(0)):
    frames = sample_frames(_times(301), 8, frame_step=4, num_clips=3, rng=rng)
    assert frames.shape == (3, 8)
    for i, clip in enumerate(frames):
      assert 100 * i <= clip[0] <= clip[-1] < 100 * (i + 1)
      assert clip[-1] - clip[0] == 31
    if rng is None:
      np.testing.assert_array_equal(frames[:, 0], [0, 100, 200])


@pytest.mark.parametrize('option', [{'frame_step': 4}, {'fps': 7.5}])
def test_start_is_uniform(option):
  rng = np.random.default_rng(0)
  starts = [
    sample_frames(_times(70), 16, rng=rng, **option)[0, 0] for _ in range(1200)
  ]
  counts = np.bincount(starts)
  assert len(counts) == 6  # The window is 64 of 70 frames, its end exclusive.
  assert counts.min() > 150


def test_short_videos_repeat_the_last_frame():
  frames = sample_frames(_times(20), 16, frame_step=4)[0]
  np.testing.assert_array_equal(frames, [0, 5, 10, 15] + [19] * 12)
  frames = sample_frames(_times(20), 16, fps=7.5)[0]
  np.testing.assert_array_equal(frames, [0, 5, 10, 15] + [19] * 12)
  np.testing.assert_array_equal(
    sample_frames(_times(1), 4, frame_step=4), [[0, 0, 0, 0]]
  )
  np.testing.assert_array_equal(sample_frames(_times(1), 4, fps=4), [[0] * 4])


def test_more_clips_than_frames_stays_inside():
  frames = sample_frames(_times(3), 4, frame_step=2, num_clips=5)
  assert frames.shape == (5, 4)
  assert frames.min() >= 0 and frames.max() <= 2


@pytest.mark.parametrize('jitter', [0.0, 5e-4])
def test_fps_equals_the_step_it_is_a_multiple_of(jitter):
  for num_frames in (64, 65, 100, 311):
    times = _times(num_frames)
    times += np.random.default_rng(0).uniform(-jitter, jitter, num_frames)
    for num_clips in (1, 2):
      if num_frames % num_clips == 0:
        np.testing.assert_array_equal(
          sample_frames(times, 16, fps=7.5, num_clips=num_clips),
          sample_frames(times, 16, frame_step=4, num_clips=num_clips),
        )


def test_fps_follows_the_clock_of_a_variable_rate():
  times = np.concatenate([_times(60), 2 + _times(30, fps=10)])
  frames = sample_frames(times, 9, fps=2)[0]
  moments = np.linspace(0, 4.5, 9)
  assert np.all(times[frames] <= moments + 0.05 * 0.056)
  assert np.all(moments[:-1] - times[frames][:-1] < 0.1 + 1e-6)


def test_fps_above_that_of_the_video_repeats_frames():
  frames = sample_frames(_times(100, fps=2), 16, fps=8)[0]
  np.testing.assert_array_equal(np.unique(frames), [0, 1, 2, 3])
  assert (np.diff(frames) >= 0).all()
  rng = np.random.default_rng(0)
  for _ in range(20):
    frames = sample_frames(_times(5, fps=2), 16, fps=8, rng=rng)[0]
    assert frames.min() >= 0 and frames.max() <= 4


def test_same_rng_same_frames():
  draw = lambda: sample_frames(  # noqa: E731
    _times(999), 16, fps=4, num_clips=2, rng=np.random.default_rng(7)
  )
  np.testing.assert_array_equal(draw(), draw())


@pytest.mark.parametrize(
    'arguments',
    [{}, {'frame_step': 4, 'fps': 4.0}, {'frame_step': 0}, {'fps': -1.0},
     {'frame_step': 1, 'num_clips': 0}],
)  # fmt: skip
def test_rejects_contradictions(arguments):
  with pytest.raises(ValueError, match='frame_step='):
    sample_frames(_times(9), 2, **arguments)


def test_rejects_no_frames():
  with pytest.raises(ValueError, match='without frames'):
    sample_frames(np.zeros(0), 2, frame_step=1)
