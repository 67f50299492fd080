"""Predictions: as in training, from what is visible alone, and on and on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import GRID, NUM_PIXELS, TUBELET, make_video, make_world

from vjepa_jax.models.decoder import FeatureDecoder
from vjepa_jax.models.tubelets import patchify, unpatchify
from vjepa_jax.training.objectives.salt import PixelTargets
from vjepa_jax.training.objectives.targets import FeatureTargets
from vjepa_jax.training.objectives.vjepa import VJepa
from vjepa_jax.training.objectives.vjepa21 import VJepa21
from vjepa_jax.world import rollout, scores
from vjepa_jax.world.baselines import fill_pixels
from vjepa_jax.world.decoding import LoadedDecoder
from vjepa_jax.world.masks import choose_hidden
from vjepa_jax.world.model import complete_clip, encode_target, measure_space
from vjepa_jax.world.predict import (
  MaskedPredictor,
  choose_mask_token,
  score_features,
  score_pixels,
)
from vjepa_jax.world.retrieval import Retrieval

BOX = (0.0, 0.0, 1.0, 0.5)


@pytest.fixture(scope='module')
def worlds():
  return {norm: make_world(norm) for norm in ('imagenet', 'clip')}


def _make(world, hide='future', steps=2, video=None):
  space = measure_space(world, [make_video() if video is None else video])
  grid = (1, *GRID[1:]) if world.is_image else GRID
  return MaskedPredictor(
    world, space, grid, choose_hidden(grid, hide, steps, BOX), 0
  )


@pytest.fixture(scope='module')
def future(worlds):
  return _make(worlds['clip']._replace(target_norm='position'))


@pytest.fixture(scope='module')
def loaded(future):
  decoder = FeatureDecoder(NUM_PIXELS, width=24, depth=1, num_heads=2)
  init = jax.jit(decoder.init, static_argnums=2)
  params = init(jax.random.key(0), jnp.zeros((1, 16, 48)), GRID)
  params['params']['linear']['kernel'] = jax.random.normal(
    jax.random.key(2), (48, NUM_PIXELS)
  )
  return LoadedDecoder(decoder, params['params'], future.space, GRID)


@pytest.mark.parametrize(
  'fields',
  [
    {'target_norm': 'layer'},
    {'target_norm': 'position'},
    {'target_view': 'targets'},
    {'targets': 'pixels'},
    {'levels': (0, 1)},
    {'levels': (0, 1), 'frames': 1},
  ],
  ids=str,
)
def test_errors_are_the_loss_of_training(worlds, fields):
  levels = fields.get('levels')
  if 'targets' in fields or levels:
    world = make_world('imagenet', **fields)
  else:
    world = worlds['imagenet']._replace(**fields)
  video = make_video(frames=fields.get('frames', 8))
  future = _make(world, 'region', world.frames != 1, video)
  ids = {
    'context': np.tile(future.visible, (4, 1)),
    'target': np.tile(future.hidden, (4, 1)),
  }
  targets = FeatureTargets(world.encoder, world.target_norm, world.target_view)
  if 'targets' in fields:
    targets = PixelTargets(TUBELET)
  objective = VJepa(world.encoder, world.predictor, targets, ('m',))
  if levels:
    objective = VJepa21(
      world.encoder,
      world.predictor,
      dataclasses.replace(targets, levels=levels),
      ('m',),
      context_weight=0.0,
    )
  loss, metrics = jax.jit(objective.loss)(
    {name: world.params[name] for name in ('encoder', 'predictor')},
    world.params['target'],
    {'video': {'pixels': video, 'masks': (ids,)}},
  )
  predicted = future.predict(video).predicted
  found = score_features(predicted, future.encode_hidden(video))
  np.testing.assert_allclose(found['error'].mean(), loss, rtol=1e-4)
  np.testing.assert_allclose(
    found['cosine'].mean(), metrics['prediction_cosine'], atol=1e-4
  )


@pytest.mark.parametrize(
  'pixel_norm,hide,steps', [('imagenet', 'future', 1), ('clip', 'region', 0)]
)
def test_nothing_of_what_is_hidden_leaks(worlds, pixel_norm, hide, steps):
  future = _make(worlds[pixel_norm], hide, steps)
  video = make_video(2, seed=1)
  cells = patchify(video, TUBELET)
  other = np.array(cells)
  other[:, future.hidden] = 255 - other[:, future.hidden]
  other = unpatchify(other, GRID, TUBELET)
  assert (other != video).mean() > 0.2
  jax.tree.map(
    np.testing.assert_array_equal, future.predict(video), future.predict(other)
  )
  # What is visible matters.
  cells[:, future.visible[0]] //= 2
  changed = unpatchify(cells, GRID, TUBELET)
  difference = (
    future.predict(changed).predicted - future.predict(video).predicted
  )
  assert np.abs(difference).max() > 1e-3


def test_neither_baselines_nor_films_see_what_is_hidden(future, loaded):
  video = make_video(2, seed=1)
  other = np.array(video)
  other[:, 4:] = 255 - other[:, 4:]
  render = rollout.make_render(future, loaded)
  for through in rollout.THROUGH:
    rollouts = (
      rollout.roll_out(future, clip, 2, through, render)
      for clip in (video, other, video)
    )
    films = [[window.render(render) for window in x] for x in rollouts]
    np.testing.assert_array_equal(films[0], films[1])
    np.testing.assert_array_equal(films[0], films[2])  # deterministic
    assert len(films[0]) == 3 and films[0][0].shape == video.shape
    assert np.isfinite(films[0]).all()
    # It goes on, and does not repeat itself.
    assert np.abs(films[0][1] - films[0][0]).mean() > 0.1
  for how in ('last', 'mean'):
    args = future.masks, TUBELET, how
    filled = fill_pixels(video, *args)
    np.testing.assert_array_equal(filled, fill_pixels(other, *args))


def test_fed_back_pixels_are_the_end_of_the_window_before(future, loaded):
  video = make_video(1)
  render = rollout.make_render(future, loaded)
  first, second = rollout.roll_out(future, video, 1, 'pixels', render)
  film = first.render(render)
  np.testing.assert_array_equal(second.clip[:, :4], np.round(film[:, 4:]))
  assert not second.clip[:, 4:].any()


def test_fed_back_features_are_what_was_predicted(worlds):
  # With three steps visible and one hidden, two of the three are real.
  future = _make(worlds['imagenet']._replace(target_norm='position'), steps=3)
  video = make_video(1)
  first, second = rollout.roll_out(future, video, 1, 'features')
  space = future.space
  np.testing.assert_allclose(
    second.prediction.visible[:, 8:], first.prediction.predicted, rtol=1e-5
  )
  context = space.normalize(first.prediction.context, future.visible)
  np.testing.assert_allclose(
    second.prediction.visible[:, :8], context[:, 4:], rtol=1e-5
  )
  # As features of their new places.
  np.testing.assert_allclose(
    second.prediction.context,
    space.restore(second.prediction.visible, future.visible),
    rtol=1e-5,
  )


@pytest.mark.parametrize('norm', ['layer', 'position'])
def test_features_go_to_the_space_of_targets_and_back(worlds, norm):
  world = worlds['imagenet']._replace(target_norm=norm)
  video = make_video(8)
  space = measure_space(world, [video[:4], video[4:]])
  ids = np.arange(3, 9)
  encode = jax.jit(lambda x: encode_target(world, world.params, x))
  features = encode(video)[:, ids]
  normal = space.normalize(features, ids)
  back = space.restore(normal, ids)
  # By position it is exact; layer by layer but for what differs by token.
  bound = 1e-4 if norm == 'position' else 0.5
  assert np.abs(back - features).max() < bound * np.abs(features).max()
  if norm == 'position':
    mean = space.normalize(encode(video)).mean(axis=0)
    np.testing.assert_allclose(mean, 0.0, atol=1e-4)
  else:
    # The share of a position is exchanged for that of another.
    mean = space.transfer(normal.mean(axis=0, keepdims=True), ids, ids + 4)
    np.testing.assert_allclose(mean[0], space.average[ids + 4], atol=1e-4)


@pytest.mark.parametrize(
  'hide,steps,through,decodes,message',
  [
    ('past', 2, 'features', False, 'needs --hide=future'),
    ('region', 0, 'features', False, 'needs --hide=future'),
    ('future', 2, 'pixels', False, 'needs --decode'),
    ('future', 2, 'thoughts', True, 'is not one of'),
  ],
)
def test_rollouts_that_are_impossible(
  worlds, hide, steps, through, decodes, message
):
  masks = choose_hidden(GRID, hide, steps, BOX)
  future = MaskedPredictor(worlds['clip'], None, GRID, masks, 0)
  with pytest.raises(ValueError, match=message):
    rollout.check_rollout(future, through, decodes)


def test_pixels_of_baselines():
  video = make_video(1)

  def fill(hide, steps, how='last'):
    return fill_pixels(
      video, choose_hidden(GRID, hide, steps, BOX), TUBELET, how
    )

  last = fill('future', 2)
  np.testing.assert_array_equal(last[:, :4], video[:, :4])
  np.testing.assert_array_equal(last[:, 4:], video[:, [3] * 4])
  mean = fill('future', 2, 'mean')
  expected = video[:, :4].astype(np.float32).mean(axis=1, keepdims=True)
  np.testing.assert_allclose(mean[:, 4:], expected.repeat(4, 1), rtol=1e-5)
  np.testing.assert_array_equal(fill('past', 2)[:, :4], video[:, [4] * 4])
  # Where a place is never visible its neighbour stands in, as it moves.
  near = fill('region', 0)
  np.testing.assert_array_equal(near[:, :, :8, :8], video[:, :, :8, 8:])


def test_psnr_is_of_hidden_pixels():
  video = np.full((2, 8, 16, 16, 3), 100, np.uint8)
  other = video.astype(np.float32)
  other[:, :4] += 50  # visible: does not count
  other[0, 4:] += 2
  other[1, 4:] += 10
  _, hidden = choose_hidden(GRID, 'future', 2, BOX)
  psnr = score_pixels(other, video, hidden, TUBELET)
  np.testing.assert_allclose(psnr, 20 * np.log10([127.5, 25.5]), rtol=1e-5)


def test_scores_of_the_truth_are_perfect_and_baselines_are_there(
  future, loaded
):
  video = make_video(3, seed=2)
  video[:, 4:] = video[:, [3]]  # a still, which its last frame predicts
  scorer = scores.Scorer(future, rollout.make_render(future, loaded))
  found = scorer.score(video)
  assert set(found) == set(scores.TITLES)
  np.testing.assert_allclose(found['last']['cosine'], 1.0, atol=1e-5)
  assert (found['last']['psnr'] > 60).all()
  assert (found['prediction']['cosine'] < 0.9).all()
  np.testing.assert_allclose(
    found['last_decoded']['psnr'], found['actual']['psnr'], atol=1e-3
  )
  summary = scores.join_scores([found] * 2)
  x = np.tile(found['mean']['psnr'], 2)
  assert summary['mean']['psnr'] == pytest.approx(
    {'mean': x.mean(), 'standard_error': x.std(ddof=1) / 6**0.5}
  )
  table = scores.format_scores(summary).splitlines()
  assert len(table) == 1 + len(scores.TITLES) and '±' in table[1]


def test_retrieval_finds_what_is_there(future):
  videos = make_video(5, seed=3)
  retrieval = Retrieval(future, videos, 2)
  truth = np.asarray(future.encode_hidden(videos[[3]]))[0]
  found = retrieval.find(truth, truth, future.hidden, 2)
  assert found.steps.tolist() == [2, 3] and found.candidates == 21
  assert found.ranks.tolist() == [1, 1]
  np.testing.assert_allclose(found.similarities[:, 0], 1.0, atol=1e-3)
  np.testing.assert_array_equal(found.frames[:, 0], videos[3, [5, 7]])
  other = np.asarray(future.encode_hidden(videos[[1]]))[0]
  assert (retrieval.find(other, truth, future.hidden, 2).ranks > 1).all()


def test_the_mask_token_is_one_that_was_trained(worlds):
  world = worlds['clip']
  assert choose_mask_token(world, 'future') == 1
  kinds = world._replace(mask_kinds=('future', 'random'))
  assert choose_mask_token(kinds, 'future') == 0
  tokens = np.array(world.params['predictor']['mask_tokens'])
  for trained, expected in ((1, 0), (0, 0)):
    tokens[trained:] = 0
    predictor = world.params['predictor'] | {'mask_tokens': tokens}
    other = world._replace(params=world.params | {'predictor': predictor})
    assert choose_mask_token(other, 'future') == expected


def test_clips_of_models_that_do_not_say_are_asked_for(worlds):
  world = worlds['clip']
  with pytest.raises(ValueError, match='give frames, resolution, frame_step'):
    complete_clip(world)
  sized = world._replace(frames=8, resolution=16)
  with pytest.raises(ValueError, match='give frame_step or fps .of released'):
    complete_clip(sized)
  clip = complete_clip(sized, fps=4.0)
  assert (clip.frames, clip.resolution) == (8, 16)
  assert (clip.frame_step, clip.fps) == (None, 4.0)
  with pytest.raises(ValueError, match='height of the clip, 20'):
    complete_clip(sized, resolution=20, fps=4.0)
