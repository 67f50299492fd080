"""Objective and train step: the invariants of the method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

from vjepa_jax.models import zoo
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.training import (
  context_loss,
  normalization,
  objective,
  optimizer,
  step,
)
from vjepa_jax.training import state as state_lib

GRID = (2, 4, 4)
BATCH = 8


def _constants(**values):
  values = {'learning_rate': 1e-3, 'weight_decay': 0.04, 'ema': 0.9} | values
  return {k: lambda _, v=v: jnp.float32(v) for k, v in values.items()}


def _models():
  encoder = zoo.build_encoder('nano', tubelet=(2, 8, 8), remat='full')
  predictor = zoo.build_predictor(
    encoder, num_heads=2, width=24, depth=1, num_mask_tokens=2
  )
  return encoder, predictor


def _objective(**fields):
  return objective.Objective(*_models(), ('short', 'long'), **fields)


def _init(seed=0):
  encoder, predictor = _models()
  tx = optax.scale_by_adam()
  return jax.jit(
    lambda key: state_lib.init_state(key, encoder, predictor, tx, GRID)
  )(jax.random.key(seed))


def _batch(seed):
  rng = np.random.default_rng(seed)
  masks = []
  for context, target in ((8, 16), (4, 20)):
    ids = np.stack([rng.permutation(32) for _ in range(BATCH)]).astype(np.int32)
    masks.append(
      {
        'context': np.sort(ids[:, :context]),
        'target': np.sort(ids[:, context : context + target]),
      }
    )
  video = rng.integers(0, 256, (BATCH, 4, 32, 32, 3), dtype=np.uint8)
  return {'video': {'pixels': video, 'masks': tuple(masks)}}


@pytest.fixture(scope='module')
def initial():
  # Random mask tokens and biases, so that nothing vanishes by initialisation.
  state = _init()
  key = jax.random.key(7)
  return state.replace(
    params=jax.tree.map(
      lambda p: p + 0.02 * jax.random.normal(key, p.shape), state.params
    )
  )


@pytest.fixture(scope='module')
def run_step():
  steps = {}

  def run(state, batch, schedules=None, **options):
    key = str(options)
    if key not in steps or schedules is not None:
      steps[key] = jax.jit(
        step.make_train_step(
          _objective(),
          optax.scale_by_adam(),
          schedules or _constants(),
          **options,
        )
      )
    return steps[key](state, batch)

  return run


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_target_starts_as_a_copy_of_the_context_encoder():
  state = _init()
  _assert_equal(state.target, state.params['encoder'])
  leaves = (
    jax.tree.leaves(state.target),
    jax.tree.leaves(state.params['encoder']),
  )
  for target, online in zip(*leaves, strict=True):
    assert target.unsafe_buffer_pointer() != online.unsafe_buffer_pointer()


@pytest.mark.parametrize('target_view', objective.TARGET_VIEWS)
def test_no_gradient_reaches_the_target(initial, target_view):
  goal = _objective(target_view=target_view)

  def loss(params, target):
    return objective.compute_loss(params, goal, target, _batch(0))[0]

  online, target = jax.jit(jax.grad(loss, argnums=(0, 1)))(
    initial.params, initial.target
  )
  assert all(not g.any() for g in jax.tree.leaves(target))
  assert all(g.any() for g in jax.tree.leaves(online['encoder']['embed']))
  assert online['predictor']['mask_tokens'].any(axis=1).all()


@pytest.mark.parametrize('loss_exp', [1.0, 2.0])
def test_loss_is_the_published_formula(initial, loss_exp):
  goal, batch = _objective(loss_exp=loss_exp), _batch(0)
  loss, metrics = objective.compute_loss(
    initial.params, goal, initial.target, batch
  )
  encoder, predictor = _models()
  clip = np.asarray(
    encoder.apply({'params': initial.target}, batch['video']['pixels'])
  )
  mean, var = clip.mean(-1, keepdims=True), clip.var(-1, keepdims=True)
  clip = (clip - mean) / np.sqrt(var + 1e-5)
  losses, stds = [], []
  for i, mask in enumerate(batch['video']['masks']):
    context = encoder.apply(
      {'params': initial.params['encoder']},
      batch['video']['pixels'],
      mask['context'],
    )
    z = np.asarray(
      predictor.apply(
        {'params': initial.params['predictor']},
        context,
        mask['context'],
        mask['target'],
        GRID,
        i,
      )
    )
    h = np.stack([c[ids] for c, ids in zip(clip, mask['target'], strict=True)])
    losses.append((np.abs(z - h) ** loss_exp).mean() / loss_exp)
    stds.append(np.sqrt(z.var(axis=1, ddof=1) + 1e-4))
  assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
  assert float(metrics['loss_long']) == pytest.approx(losses[1], rel=1e-4)
  variance = np.maximum(1 - np.mean(stds, axis=0), 0).mean()
  assert float(metrics['loss_variance']) == pytest.approx(variance, rel=1e-4)


def test_variance_term_is_optional(initial):
  plain, weighted = (
    objective.compute_loss(
      initial.params,
      _objective(variance_weight=w),
      initial.target,
      _batch(0),
    )
    for w in (0.0, 0.5)
  )
  expected = plain[0] + 0.5 * plain[1]['loss_variance']
  assert float(weighted[0]) == pytest.approx(float(expected), rel=1e-5)


def test_targets_by_position_have_nothing_that_clips_share(initial):
  batch = _batch(3)
  batch['video']['masks'] = tuple(
    {k: np.broadcast_to(ids[:1], ids.shape) for k, ids in mask.items()}
    for mask in batch['video']['masks']
  )
  by_position = _objective(target_norm='position')
  targets, _ = objective.encode_targets(by_position, initial.target, batch)
  encoder = by_position.encoder
  features = np.asarray(
    encoder.apply({'params': initial.target}, batch['video']['pixels']),
    np.float32,
  )
  expected = (features - features.mean(0)) / (features.std(0) + 0.05)
  for target, mask in zip(targets, batch['video']['masks'], strict=True):
    np.testing.assert_allclose(target.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(
      target, expected[:, mask['target'][0]], atol=1e-4
    )
  with pytest.raises(ValueError, match="needs target_view 'clip'"):
    objective.check_objective(
      _objective(target_norm='position', target_view='targets')
    )


def test_target_of_targets_cannot_see_the_context(initial):
  batch = _batch(0)
  seen, _ = objective.encode_targets(
    _objective(target_view='targets'), initial.target, batch
  )
  other = {
    'video': batch['video'] | {'pixels': batch['video']['pixels'].copy()}
  }
  # Token 0 is the corner of the first frames; change it where it is hidden
  # from the first mask's targets.
  rows = [
    r for r in range(BATCH) if 0 not in batch['video']['masks'][0]['target'][r]
  ]
  other['video']['pixels'][rows, :2, :8, :8] = 0
  again, _ = objective.encode_targets(
    _objective(target_view='targets'), initial.target, other
  )
  np.testing.assert_allclose(again[0], seen[0], atol=1e-6)
  whole = [
    objective.encode_targets(_objective(), initial.target, b)[0][0]
    for b in (batch, other)
  ]
  assert np.abs(whole[0] - whole[1])[rows].max() > 1e-4


def test_target_moves_by_the_ema_formula(initial, run_step):
  new, _ = run_step(initial, _batch(0))
  expected = jax.tree.map(
    lambda t, p: 0.9 * t + 0.1 * p, initial.target, new.params['encoder']
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
    new.target,
    expected,
  )
  assert int(new.step) == 1


def test_update_is_adamw_with_the_published_exclusions(initial, run_step):
  tx = optax.adamw(1e-3, weight_decay=0.04, mask=optimizer.mask_decayed)
  grads = jax.jit(
    jax.grad(
      lambda p: objective.compute_loss(
        p, _objective(), initial.target, _batch(0)
      )[0]
    )
  )(initial.params)
  updates, _ = tx.update(grads, tx.init(initial.params), initial.params)
  expected = optax.apply_updates(initial.params, updates)
  new, _ = run_step(initial, _batch(0))
  # Gradients near zero have signs of their own: compare what is clearly not.
  for want, have, grad in zip(
    *map(jax.tree.leaves, (expected, new.params, grads)), strict=True
  ):
    clear = np.abs(grad) > 1e-5
    np.testing.assert_allclose(have[clear], want[clear], atol=2e-5)

  excluded = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, decays in jax.tree_util.tree_leaves_with_path(
      optimizer.mask_decayed(initial.params)
    )
    if not decays
  }
  assert 'encoder/norm/scale' in excluded
  assert 'encoder/transformer/blocks/attention/query/bias' in excluded
  assert 'encoder/transformer/blocks/attention/out_bias' in excluded
  assert 'predictor/mask_tokens' not in excluded
  assert all(n.endswith(('bias', 'scale')) for n in excluded)


def test_modules_are_clipped_separately_and_from_a_step_on():
  grads = {'encoder': jnp.full(4, 10.0), 'predictor': jnp.full(4, 0.1)}
  clipped, norms = optimizer.clip_by_module(grads, 10.0)
  assert float(norms['encoder']) == pytest.approx(20.0)
  np.testing.assert_allclose(clipped['encoder'], 5.0, rtol=1e-6)
  np.testing.assert_array_equal(clipped['predictor'], grads['predictor'])


def test_clipping_starts_at_its_step(initial, run_step):
  # Adam forgets the scale of a gradient, its second moment does not.
  options = dict(clip_norm=1e-4, clip_start_step=1)
  first, _ = run_step(initial, _batch(0), **options)
  later, _ = run_step(initial.replace(step=jnp.int32(1)), _batch(0), **options)
  moments = [
    float(optax.tree.norm(s.opt_state.mu['predictor'])) for s in (first, later)
  ]
  assert moments[1] == pytest.approx(1e-5, rel=1e-2)
  assert moments[0] > 10 * moments[1]


def test_a_non_finite_update_is_skipped_and_counted(initial, run_step):
  poisoned = jax.tree.map(lambda x: x, initial.params)
  poisoned['predictor']['proj']['bias'] = jnp.full(48, jnp.nan)
  bad = initial.replace(params=poisoned)
  new, metrics = run_step(bad, _batch(0))
  assert float(metrics['skipped']) == 1
  _assert_equal(new.params, bad.params)
  _assert_equal(new.opt_state, bad.opt_state)
  assert int(new.step) == 1  # schedules go on
  _, metrics = run_step(initial, _batch(0))
  assert float(metrics['skipped']) == 0


def _train(fsdp, devices, steps=5, **fields):
  mesh = mesh_lib.make_mesh(fsdp, jax.devices()[:devices])
  state = _init()
  shardings = sharding.shard_tree(state, mesh, min_elements=256)
  state = jax.device_put(state, shardings)
  rows = sharding.shard_batch(mesh)
  train_step = jax.jit(
    step.make_train_step(
      _objective(**fields), optax.scale_by_adam(), _constants()
    ),
    donate_argnums=0,
    in_shardings=(shardings, rows),
    out_shardings=(shardings, sharding.replicate(mesh)),
  )
  losses = []
  with jax.set_mesh(mesh):
    for i in range(steps):
      batch = sharding.make_global(_batch(i), rows)
      state, metrics = train_step(state, batch)
      losses.append(float(metrics['loss']))
  return losses, state


def test_microbatches_give_the_step_of_the_whole_batch(initial, run_step):
  options = {'clip_norm': 1e-3}  # what is clipped is the sum, not its parts
  expected, metrics = run_step(initial, _batch(1), **options)
  actual, others = run_step(initial, _batch(1), microbatches=4, **options)
  for name in ('loss', 'prediction_std', 'gradient_norm_encoder'):
    np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5)
  expected, actual = expected.opt_state.mu, actual.opt_state.mu
  # Some gradients, of the keys' biases, are rounding errors around zero.
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5 * scale),
    actual,
    expected,
  )


def test_masks_in_one_pass_give_the_losses_of_separate_passes(initial):
  goal, batch = _objective(), _batch(1)
  _, metrics = jax.jit(objective.compute_loss, static_argnums=1)(
    initial.params, goal, initial.target, batch
  )
  for i, name in enumerate(goal.mask_names):
    mask = batch['video']['masks'][i]
    context = goal.encoder.apply(
      {'params': initial.params['encoder']},
      batch['video']['pixels'],
      mask['context'],
    )
    predicted = goal.predictor.apply(
      {'params': initial.params['predictor']},
      context,
      mask['context'],
      mask['target'],
      GRID,
      i,
    )
    target = objective.encode_targets(goal, initial.target, batch)[0][i]
    np.testing.assert_allclose(
      metrics[f'loss_{name}'],
      np.abs(predicted - target).mean(),
      rtol=1e-6,
    )


def test_eight_devices_give_the_losses_of_one():
  expected, _ = _train(fsdp=1, devices=1)
  losses, state = _train(fsdp=2, devices=8)
  np.testing.assert_allclose(losses, expected, atol=1e-5)
  # Parameters, both moments and the target are really split.
  for tree in (
    state.params['encoder'],
    state.opt_state.mu['encoder'],
    state.opt_state.nu['encoder'],
    state.target,
  ):
    kernel = tree['transformer']['blocks']['mlp']['fc1']['kernel']
    assert kernel.sharding.spec == jax.P(None, None, 'fsdp')
    assert kernel.addressable_shards[0].data.size == kernel.size // 2


def test_distance_is_that_to_the_nearest_target():
  grid = (3, 4, 5)
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(60) for _ in range(3)]).astype(np.int32)
  context, target = ids[:, :20], ids[:, 20:27]
  measured = context_loss.measure_distance(context, target, grid)
  for i in range(3):
    hidden = np.ones(grid)
    hidden.reshape(-1)[target[i]] = 0
    expected = ndimage.distance_transform_edt(hidden).reshape(-1)[context[i]]
    np.testing.assert_allclose(measured[i], expected, atol=1e-5)


def _loss(state, batch, fields, step=0):
  described = _objective(**fields)
  encoder = described.encoder
  predictor = zoo.build_predictor(
    encoder,
    num_heads=2,
    width=24,
    depth=1,
    num_mask_tokens=2,
    out_width=384 if fields.get('targets') == 'pixels' else None,
    predict_context=fields.get('context_weight', 0) > 0,
  )
  described = described._replace(predictor=predictor)
  ids = batch['video']['masks'][0]
  context = jnp.zeros((BATCH, ids['context'].shape[1], encoder.width))
  params = {
    'encoder': state.params['encoder'],
    'predictor': predictor.init(
      jax.random.key(1), context, ids['context'], ids['target'], GRID
    )['params'],
  }
  (loss, metrics), grads = jax.value_and_grad(
    objective.compute_loss, has_aux=True
  )(params, described, state.target, batch, step)
  return float(loss), metrics, grads


def test_context_loss_rises_with_the_steps_and_trains_its_own_head(initial):
  batch = _batch(5)
  fields = {'context_weight': 0.5, 'context_warmup_steps': (10, 30)}
  losses = {s: _loss(initial, batch, fields, s) for s in (0, 20, 100)}
  prediction = float(losses[0][1]['loss_prediction'])
  term = float(losses[0][1]['loss_context'])
  for done, weight in ((0, 0.0), (20, 0.25), (100, 0.5)):
    expected = prediction + weight * term
    assert losses[done][0] == pytest.approx(expected, rel=1e-5)
  head = losses[100][2]['predictor']['proj_context']['kernel']
  assert float(jnp.abs(head).max()) > 0
  assert not losses[0][2]['predictor']['proj_context']['kernel'].any()
  near = _loss(initial, batch, fields | {'context_distance': False})
  assert float(near[1]['loss_context']) > term


@pytest.mark.parametrize(
  'weight', ['feature_variance_weight', 'covariance_weight', 'sigreg_weight']
)
def test_terms_on_features_reach_the_encoder_alone(initial, weight):
  batch = _batch(6)
  plain, without, _ = _loss(initial, batch, {})
  loss, metrics, grads = _loss(initial, batch, {weight: 2.0}, 3)
  name = f'loss_{weight.removesuffix("_weight")}'
  assert name not in without
  assert loss == pytest.approx(plain + 2 * float(metrics[name]), rel=1e-5)
  base = _loss(initial, batch, {}, 3)[2]
  for module, moved in (('encoder', True), ('predictor', False)):
    same = jax.tree.map(
      lambda a, b: np.allclose(a, b, atol=1e-7), grads[module], base[module]
    )
    assert all(jax.tree.leaves(same)) != moved


def test_pixel_targets_are_tubelets_and_need_no_target_encoder(initial):
  batch = _batch(7)
  broken = initial.replace(
    target=jax.tree.map(lambda x: x * jnp.nan, initial.target)
  )
  loss, metrics, _ = _loss(broken, batch, {'targets': 'pixels'})
  assert np.isfinite(loss) and 0.8 < float(metrics['target_std']) < 1.1
  (pixels, _), visible = objective.encode_targets(
    _objective(targets='pixels'), None, batch
  )
  assert visible is None
  assert pixels.shape == (BATCH, 16, 384)
  means = np.asarray(pixels).reshape(BATCH, 16, -1, 3).mean(axis=2)
  np.testing.assert_allclose(means, 0.0, atol=1e-5)


def test_a_frozen_teacher_of_another_size_gives_the_targets(initial):
  teacher = zoo.build_encoder('nano', tubelet=(2, 8, 8)).clone(
    width=64, positions='rope_interleaved'
  )
  batch = _batch(8)
  encoder, predictor = _models()
  goal = _objective(targets='frozen', teacher=teacher)._replace(
    predictor=predictor.clone(out_width=64)
  )
  tx = optax.scale_by_adam()

  @jax.jit
  def init(key):
    state = state_lib.init_state(key, encoder, goal.predictor, tx, GRID)
    params = teacher.init(key, batch['video']['pixels'])['params']
    return state.replace(teacher=params)

  state = init(jax.random.key(0))
  frozen = jax.tree.map(np.array, state.teacher)
  target = jax.tree.map(np.array, state.target)
  places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.teacher)]
  expected = normalization.normalize_features(
    teacher.apply({'params': frozen}, batch['video']['pixels'])
  )
  targets, _ = objective.encode_targets(goal, state.teacher, batch)
  for found, mask in zip(targets, batch['video']['masks'], strict=True):
    rows = np.arange(BATCH)[:, None]
    np.testing.assert_allclose(found, expected[rows, mask['target']], atol=1e-5)
  gradient = jax.jit(
    jax.grad(lambda p: objective.compute_loss(state.params, goal, p, batch)[0])
  )(state.teacher)
  assert all(not g.any() for g in jax.tree.leaves(gradient))

  train_step = jax.jit(
    step.make_train_step(goal, tx, _constants()), donate_argnums=0
  )
  for i in range(2):
    state, metrics = train_step(state, _batch(i))
    assert np.isfinite(metrics['loss'])
  _assert_equal(state.teacher, frozen)
  # Not even copied.
  assert places == [
    x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.teacher)
  ]
  # The average of the student goes on.
  moved = state.target['embed']['proj']['kernel']
  assert np.abs(moved - target['embed']['proj']['kernel']).max() > 0


def test_directions_of_sigreg_come_from_seed_and_step(initial):
  batch = _batch(6)

  @functools.partial(jax.jit, static_argnums=0)
  def compute(seed, step):
    goal = _objective(seed=seed, sigreg_weight=0.1, covariance_weight=0.1)
    _, metrics = objective.compute_loss(
      initial.params, goal, initial.target, batch, step
    )
    return metrics['loss_sigreg'], metrics['loss_covariance']

  runs = [compute(*run) for run in ((0, 0), (0, 0), (0, 1), (1, 0))]
  sigreg, covariance = (
    [float(x) for x in values] for values in zip(*runs, strict=True)
  )
  assert sigreg[0] == sigreg[1]
  assert len(set(sigreg)) == 3
  np.testing.assert_allclose(covariance, covariance[0], rtol=1e-5)


def test_terms_on_features_are_those_of_the_whole_batch_on_any_mesh():
  fields = dict(covariance_weight=0.1, sigreg_weight=0.01)
  expected, _ = _train(fsdp=1, devices=1, steps=3, **fields)
  losses, _ = _train(fsdp=2, devices=8, steps=3, **fields)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
