"""Surprise: what it sees, what it compares, how pairs are scored."""

import jax
import numpy as np
import optax
import pytest

from vjepa_jax.models import zoo
from vjepa_jax.training.normalization import (
  normalize_features,
  normalize_over_clips,
)
from vjepa_jax.training.objective import Objective, compute_loss
from vjepa_jax.training.state import init_state
from vjepa_jax.world import surprise
from vjepa_jax.world.masks import choose_hidden
from vjepa_jax.world.model import TargetSpace, WorldModel, encode_target
from vjepa_jax.world.predict import MaskedPredictor
from vjepa_jax.world.surprise_scores import score_pairs

WINDOWS = surprise.Windows(frames=8, context_frames=4, stride=2)


def _make_model(pixel_norm='imagenet', **fields):
  encoder = zoo.build_encoder(
    'nano', tubelet=(2, 8, 8), pixel_norm=pixel_norm, init_std=0.0
  )
  predictor = zoo.build_predictor(
    encoder,
    num_heads=2,
    width=24,
    depth=1,
    out_width=2 * 8 * 8 * 3 if fields.get('targets') == 'pixels' else None,
  )
  # Compiled: op by op it takes longer.
  state = jax.jit(init_state, static_argnums=(1, 2, 3, 4))(
    jax.random.key(0), encoder, predictor, optax.identity(), (4, 2, 2)
  )
  target = jax.tree.map(lambda x: x + 0.01, state.target)
  return WorldModel(
    encoder,
    predictor,
    encoder,
    state.params | {'target': target},
    **fields,
  )


def _film(frames=12, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
  'fields', [{}, {'target_view': 'targets'}, {'targets': 'pixels'}], ids=str
)
def test_surprise_is_the_loss_of_training(fields):
  model, film = _make_model(**fields), _film()
  (curve,) = surprise.measure_surprise(model, WINDOWS, [film], batch_size=2)
  assert curve.shape == (3,)
  objective = Objective(model.encoder, model.predictor, ('future',), **fields)

  @jax.jit
  def compute(params, target, batch):
    loss, _ = compute_loss(params, objective, target, batch)
    return loss

  params = {k: model.params[k] for k in ('encoder', 'predictor')}
  ids = np.arange(16, dtype=np.int32)[None]
  mask = {'context': ids[:, :8], 'target': ids[:, 8:]}
  for start, value in zip((0, 2, 4), curve, strict=True):
    batch = {
      'video': {'pixels': film[None, start : start + 8], 'masks': (mask,)}
    }
    loss = compute(params, model.params['target'], batch)
    np.testing.assert_allclose(value, loss, rtol=1e-4)


def test_position_norm_is_by_the_reference_films():
  model = _make_model(target_norm='position')
  films = [_film(8, seed) for seed in range(5)]
  with pytest.raises(ValueError, match='need possible films as a reference'):
    surprise.measure_surprise(model, WINDOWS, films)
  curves = surprise.measure_surprise(model, WINDOWS, films, films, batch_size=2)
  # Of films that are the reference, it is that of a batch of them.
  videos = np.stack(films)
  masks = choose_hidden((4, 2, 2), 'future', 2)
  predictor = MaskedPredictor(model, TargetSpace('layer'), (4, 2, 2), masks, 0)
  predicted = predictor.predict(videos).predicted
  features = encode_target(model, model.params, videos)[:, masks[1]]
  error = np.abs(predicted - normalize_over_clips(features))
  np.testing.assert_allclose(
    np.concatenate(curves), error.mean(axis=(1, 2)), rtol=1e-3
  )
  plain = np.abs(predicted - normalize_features(features)).mean(axis=(1, 2))
  assert np.abs(plain - error.mean(axis=(1, 2))).max() > 0.01


def test_pixels_that_stay_do_not_surprise():
  still = np.repeat(_film(1), 12, axis=0)
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
