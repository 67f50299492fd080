"""Losses: the published formulas, and what gets a gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
import small

from vjepa_jax.models.tubelets import gather_tokens
from vjepa_jax.training.objectives.regions import measure_distance
from vjepa_jax.training.objectives.targets import (
  FeatureTargets,
  normalize_features,
)


@pytest.fixture(scope='module')
def initial():
  return small.init(small.build())


@pytest.mark.parametrize('target_view', ['clip', 'targets'])
def test_no_gradient_reaches_the_target(initial, target_view):
  goal = small.build(target_view=target_view)
  (online, target), _ = jax.jit(
    jax.grad(goal.loss, argnums=(0, 1), has_aux=True)
  )(initial.params, initial.target, small.make_batch(0))
  assert all(not g.any() for g in jax.tree.leaves(target))
  assert all(g.any() for g in jax.tree.leaves(online['encoder']['embed']))
  assert online['predictor']['mask_tokens'].any(axis=1).all()


@pytest.mark.parametrize('loss_exp', [1.0, 2.0])
def test_loss_is_the_published_formula(initial, loss_exp):
  # Each mask in a pass of its own.
  goal = small.build(loss_exp=loss_exp, variance_weight=0.5)
  batch = small.make_batch(0)
  pixels = batch['video']['pixels']
  loss, metrics = jax.jit(goal.loss)(initial.params, initial.target, batch)
  clip = np.asarray(goal.encoder.apply({'params': initial.target}, pixels))
  mean, var = clip.mean(-1, keepdims=True), clip.var(-1, keepdims=True)
  clip = (clip - mean) / np.sqrt(var + 1e-5)
  encoder, predictor = (
    {'params': initial.params[name]} for name in ('encoder', 'predictor')
  )
  losses, stds = [], []
  for i, mask in enumerate(batch['video']['masks']):
    ids = mask['context'], mask['target']
    context = goal.encoder.apply(encoder, pixels, mask['context'])
    z = goal.predictor.apply(predictor, context, *ids, small.GRID, i)
    z = np.asarray(z)
    h = np.stack([c[ids] for c, ids in zip(clip, mask['target'], strict=True)])
    losses.append((np.abs(z - h) ** loss_exp).mean() / loss_exp)
    stds.append(np.sqrt(z.var(axis=1, ddof=1) + 1e-4))
  variance = np.maximum(1 - np.mean(stds, axis=0), 0).mean()
  expected = np.mean(losses) + 0.5 * variance
  assert float(loss) == pytest.approx(expected, rel=1e-4)
  for name, value in zip(small.NAMES, losses, strict=True):
    assert float(metrics[f'loss_{name}']) == pytest.approx(value, rel=1e-4)
  assert float(metrics['loss_variance']) == pytest.approx(variance, rel=1e-4)


def test_targets_by_position_have_nothing_that_clips_share(initial):
  batch = small.make_batch(3)
  batch['video']['masks'] = tuple(
    {k: np.broadcast_to(ids[:1], ids.shape) for k, ids in mask.items()}
    for mask in batch['video']['masks']
  )
  goal = small.build(target_norm='position')
  targets = goal.targets.encode(initial.target, batch['video'])
  features = np.asarray(
    goal.encoder.apply({'params': initial.target}, batch['video']['pixels'])
  )
  expected = (features - features.mean(0)) / (features.std(0) + 0.05)
  for target, mask in zip(targets, batch['video']['masks'], strict=True):
    np.testing.assert_allclose(target.mean(axis=0), 0.0, atol=1e-5)
    wanted = expected[:, mask['target'][0]]
    np.testing.assert_allclose(target, wanted, atol=1e-4)
  for options in ({'target_norm': 'position'}, {'kind': 'vjepa21'}):
    with pytest.raises(ValueError, match="target_view 'clip'"):
      small.build(target_view='targets', **options)


@pytest.mark.parametrize('view', ['clip', 'targets'])
def test_targets_are_not_rounded_to_the_compute_dtype(initial, view):
  stream = small.make_batch(3)['video']
  ids = tuple(mask['target'] for mask in stream['masks'])
  encoder = small.build().encoder.clone(dtype=jnp.bfloat16)
  targets = FeatureTargets(encoder, view=view).encode(initial.target, stream)

  def encode(*ids):
    params = {'params': initial.target}
    return encoder.apply(params, stream['pixels'], *ids, dtype=jnp.float32)

  if view == 'clip':
    clip = encode()
    features = [gather_tokens(clip, i) for i in ids]
  else:
    features = encode(ids)
  assert jnp.mean(features[0] != features[0].astype(jnp.bfloat16)) > 0.9
  expected = [normalize_features(x) for x in features]
  chex.assert_trees_all_close(list(targets), expected, atol=1e-4)


def test_target_of_targets_cannot_see_the_context(initial):
  batch = small.make_batch(0)
  # Token 0 is the corner of the first frames; change it where it is hidden
  # from the first mask's targets.
  ids = batch['video']['masks'][0]['target']
  rows = [r for r in range(small.BATCH) if 0 not in ids[r]]
  pixels = batch['video']['pixels'].copy()
  pixels[rows, :2, :8, :8] = 0
  for view in ('targets', 'clip'):
    encode = jax.jit(small.build(target_view=view).targets.encode)
    seen, again = (
      encode(initial.target, batch['video'] | {'pixels': p})[0]
      for p in (batch['video']['pixels'], pixels)
    )
    changed = np.abs(seen - again)[rows].max()
    assert changed < 1e-6 if view == 'targets' else changed > 1e-4


def test_distance_is_that_to_the_nearest_target():
  grid = (3, 4, 5)
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(60) for _ in range(3)]).astype(np.int32)
  context, target = ids[:, :20], ids[:, 20:27]
  measured = measure_distance(context, target, grid)
  for i in range(3):
    hidden = np.ones(grid)
    hidden.reshape(-1)[target[i]] = 0
    expected = ndimage.distance_transform_edt(hidden).reshape(-1)[context[i]]
    np.testing.assert_allclose(measured[i], expected, atol=1e-5)


def _differentiate(state, batch, step=0, **options):
  """Loss, metrics and gradients, from the encoder of a state."""
  goal = small.build(**options)
  params = goal.init(jax.random.key(1)) | {'encoder': state.params['encoder']}
  (loss, metrics), grads = jax.jit(jax.value_and_grad(goal.loss, has_aux=True))(
    params, state.target, batch, step
  )
  return float(loss), metrics, grads


def test_context_loss_rises_with_the_steps_and_trains_its_own_head(initial):
  batch = small.make_batch(5)
  options = {'kind': 'vjepa21', 'context_warmup_steps': (10, 30)}
  runs = {s: _differentiate(initial, batch, s, **options) for s in (0, 20, 99)}
  prediction = float(runs[0][1]['loss_prediction'])
  term = float(runs[0][1]['loss_context'])
  for done, weight in ((0, 0.0), (20, 0.25), (99, 0.5)):
    expected = prediction + weight * term
    assert runs[done][0] == pytest.approx(expected, rel=1e-5)
  heads = [runs[s][2]['predictor']['proj_context']['kernel'] for s in (0, 99)]
  assert not heads[0].any() and heads[1].any()
  near = _differentiate(initial, batch, context_distance=False, **options)
  assert float(near[1]['loss_context']) > term


@pytest.mark.parametrize('term', ['feature_variance', 'covariance', 'sigreg'])
def test_terms_on_features_reach_the_encoder_alone(initial, term):
  batch, kind = small.make_batch(6), 'regularized'
  plain, without, base = _differentiate(initial, batch, 3)
  weight = {f'{term}_weight': 2.0}
  loss, metrics, grads = _differentiate(initial, batch, 3, kind=kind, **weight)
  assert f'loss_{term}' not in without
  assert loss == pytest.approx(
    plain + 2 * float(metrics[f'loss_{term}']), rel=1e-5
  )
  for module, moved in (('encoder', True), ('predictor', False)):
    same = jax.tree.map(
      lambda a, b: np.allclose(a, b, atol=1e-7), grads[module], base[module]
    )
    assert all(jax.tree.leaves(same)) != moved


def test_directions_of_sigreg_come_from_seed_and_step(initial):
  batch = small.make_batch(6)
  weights = {'sigreg_weight': 0.1, 'covariance_weight': 0.1}
  sigreg, covariance = [], []
  for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
    goal = small.build('regularized', seed, **weights)
    _, metrics = jax.jit(goal.loss)(initial.params, initial.target, batch, step)
    sigreg.append(float(metrics['loss_sigreg']))
    covariance.append(float(metrics['loss_covariance']))
  assert sigreg[0] == sigreg[1] and len(set(sigreg)) == 3
  np.testing.assert_allclose(covariance, covariance[0], rtol=1e-5)


def test_pixel_targets_are_tubelets_and_need_no_target_encoder(initial):
  batch = small.make_batch(7)
  broken = initial.replace(
    target=jax.tree.map(lambda x: x * jnp.nan, initial.target)
  )
  loss, metrics, _ = _differentiate(broken, batch, kind='salt')
  assert np.isfinite(loss) and 0.8 < float(metrics['target_std']) < 1.1
  pixels, _ = small.build('salt').targets.encode(None, batch['video'])
  assert pixels.shape == (small.BATCH, 16, 384)
  means = np.asarray(pixels).reshape(small.BATCH, 16, -1, 3).mean(axis=2)
  np.testing.assert_allclose(means, 0.0, atol=1e-5)


def test_a_teacher_of_another_size_gives_the_targets():
  goal, batch = small.build('salt', teacher='somewhere'), small.make_batch(8)
  pixels, teacher = batch['video']['pixels'], small.init_teacher()
  expected = normalize_features(
    small.TEACHER.apply({'params': teacher}, pixels)
  )
  targets = goal.targets.encode(teacher, batch['video'])
  masks = batch['video']['masks']
  wanted = [gather_tokens(expected, mask['target']) for mask in masks]
  chex.assert_trees_all_close(targets, wanted, atol=1e-5)
  assert goal.teacher.path == 'somewhere' and goal.predictor.out_width == 64
