"""Surprise: what it sees, what it compares, how pairs are scored."""

import numpy as np
import pytest
from worlds import GRID, make_video, make_world

from vjepa_jax.training.objectives.targets import (
  normalize_features,
  normalize_over_clips,
)
from vjepa_jax.world import surprise
from vjepa_jax.world.masks import choose_hidden
from vjepa_jax.world.model import TargetSpace, encode_target
from vjepa_jax.world.predict import MaskedPredictor, score_features
from vjepa_jax.world.surprise_scores import score_pairs

WINDOWS = surprise.Windows(frames=8, context_frames=4, stride=2)


@pytest.fixture(scope='module')
def model():
  return make_world(mask_kinds=('future',))


def _make_predictor(model):
  masks = choose_hidden(GRID, 'future', 2)
  return MaskedPredictor(model, TargetSpace('layer'), GRID, masks, 0)


def test_surprise_is_the_error_of_each_window(model):
  (film,) = make_video(1, frames=12)
  (curve,) = surprise.measure_surprise(model, WINDOWS, [film], batch_size=2)
  predictor = _make_predictor(model)
  windows = np.stack([film[start : start + 8] for start in (0, 2, 4)])
  predicted = predictor.predict(windows).predicted
  scores = score_features(predicted, predictor.encode_hidden(windows))
  np.testing.assert_allclose(curve, scores['error'].mean(axis=1), rtol=1e-4)


def test_position_norm_is_by_the_reference_films(model):
  model = model._replace(target_norm='position')
  films = make_video(5)
  with pytest.raises(ValueError, match='need possible films as a reference'):
    surprise.measure_surprise(model, WINDOWS, films)
  curves = surprise.measure_surprise(model, WINDOWS, films, films, batch_size=2)
  # Of films that are the reference, it is that of a batch of them.
  predictor = _make_predictor(model)
  predicted = predictor.predict(films).predicted
  features = encode_target(model, model.params, films)[:, predictor.hidden]
  error = np.abs(predicted - normalize_over_clips(features))
  np.testing.assert_allclose(
    np.concatenate(curves), error.mean(axis=(1, 2)), rtol=1e-3
  )
  plain = np.abs(predicted - normalize_features(features)).mean(axis=(1, 2))
  assert np.abs(plain - error.mean(axis=(1, 2))).max() > 0.01


def test_pixels_that_stay_do_not_surprise():
  still = np.repeat(make_video(1, frames=1)[0], 12, axis=0)
  assert surprise.measure_pixels([still], WINDOWS)[0].max() == 0
  still[8:] = 255 - still[8:]
  curve = surprise.measure_pixels([still], WINDOWS)[0]
  # The last context frame of window 2 is frame 7, the first changed is 8.
  assert curve[0] == 0 and 0 < curve[1] < curve[2]


def test_windows():
  np.testing.assert_array_equal(WINDOWS.place(13), [0, 2, 4])
  np.testing.assert_array_equal(WINDOWS.centre(10), [5.5, 7.5])
  with pytest.raises(ValueError, match='7 frames is shorter than the window'):
    WINDOWS.place(7)
  with pytest.raises(ValueError, match='nothing to predict'):
    surprise.Windows(8, 8)
  with pytest.raises(ValueError, match='stride'):
    surprise.Windows(8, 4, 0)
  with pytest.raises(ValueError, match='whole tubelets of 4 frames'):
    surprise.Windows(8, 6).check((4, 8, 8))


def test_an_oracle_is_always_right_and_ties_count_half():
  groups = ['a', 'a', 'b', 'b']
  zeros = np.zeros(4)
  oracle = score_pairs(zeros, zeros + 1, groups)
  assert oracle == {'pairs': 4, 'accuracy': 1, 'error': 0, 'sets': 1}
  assert score_pairs(zeros + 1, zeros, groups)['accuracy'] == 0
  tied = score_pairs(zeros + 0.3, zeros + 0.3, groups)
  assert tied == {'pairs': 4, 'accuracy': 0.5, 'error': 0, 'sets': 0.5}
  # The state alone: one pair of each set is right, by more in the second set.
  scores = score_pairs(np.array([0, 1, 0, 1]), np.array([1, 0, 3, 0]), groups)
  assert (scores['accuracy'], scores['sets']) == (0.5, 0.75)
  # Without sets of several pairs, the binomial error with one degree less.
  right = np.array([1, 1, 1, 0])
  error = score_pairs(1 - right, right, list('abcd'))['error']
  assert error == pytest.approx(np.sqrt(0.75 * 0.25 / 3))
  assert np.isnan(score_pairs(zeros, zeros, ['a'] * 4)['error'])
