"""V-JEPA 2-AC beside a reference in torch: file, outputs, losses, training."""

import copy
import dataclasses
import functools
from types import SimpleNamespace

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.interop import layout, names, pytorch
from vjepa_jax.interop.huggingface import save_pretrained
from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.load import read_weights
from vjepa_jax.interop.world import load_action_model
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.tools import convert
from vjepa_jax.tools.convert import write_workdir
from vjepa_jax.training.objectives.action import (
  ActionPrediction,
  encode_frames,
  predict_frames,
)
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.step import update

torch = pytest.importorskip('torch', reason='the extra parity has torch')
from tests.interop import reference, reference_ac  # noqa: E402

_MODEL = 'V-JEPA 2-AC'
_TUBELET, _SIDES = (2, 8, 8), (2, 3)
_FRAMES = 4


@pytest.fixture(scope='module')
def modules(randomize):
  """Encoder and predictor."""
  grid = (1, *_SIDES)
  encoder = reference.Encoder(48, 2, 2, _TUBELET, grid, 'tiled')
  predictor = reference_ac.Predictor(48, 32, 3, 2, _SIDES)
  return randomize(encoder, 0), randomize(predictor, 1)


def _save(path, modules, changes=None):
  content = {
    name: {
      f'module.backbone.{k}': value for k, value in module.state_dict().items()
    }
    for name, module in zip(('encoder', 'predictor'), modules, strict=True)
  }
  content['predictor'] |= changes or {}
  torch.save(content | {'epoch': 315, 'opt': {}}, path)
  return path


@pytest.fixture(scope='module')
def weights(modules, tmp_path_factory):
  path = _save(tmp_path_factory.mktemp('file') / 'ac.pt', modules)
  return pytorch.read_checkpoint(path, num_heads=2, predictor_heads=2)


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  return {
    'features': rng.normal(size=(2, _FRAMES, *_SIDES, 48)),
    'actions': rng.normal(size=(2, _FRAMES - 1, 7)),
    'states': rng.normal(size=(2, _FRAMES, 7)),
    'extrinsics': rng.normal(size=(2, _FRAMES, 6)),
  }


@pytest.fixture
def double(monkeypatch):
  """Computes what says float32 in float64."""
  monkeypatch.setattr(jnp, 'float32', jnp.float64)
  with jax.enable_x64(True):
    yield jnp.float64


def _predict(predictor, params, inputs, dtype, *names):
  """Predicts frames from all frames but the last."""
  frames, *others = (
    jnp.asarray(inputs[name], dtype)[:, : _FRAMES - 1]
    for name in ('features', 'actions', 'states', *names)
  )
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  model = predictor.clone(dtype=dtype)
  return jax.jit(functools.partial(predict_frames, model))(
    params, frames, *others
  )


def _to_torch(inputs, dtype, *names):
  tensors = [torch.tensor(inputs[name], dtype=dtype) for name in names]
  return [tensors[0].flatten(2, 3), *tensors[1:]]


def _differentiate(weights, inputs, dtype):
  """Returns a function of parameters to the loss, its terms and gradients."""
  predictor = weights.predictor.clone(dtype=dtype)
  goal = ActionPrediction(None, predictor)
  stream = {
    k: jnp.asarray(x, dtype) for k, x in inputs.items() if k != 'extrinsics'
  }
  run = jax.value_and_grad(goal.loss, has_aux=True)
  return jax.jit(lambda params: run(params, None, {'video': stream}))


def _get_params(weights, dtype):
  params = {'predictor': weights.predictor_params}
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def _compare_losses(note_error, metrics, losses, label, bound):
  for name, expected in zip(
    ('teacher_forcing', 'rollout'), losses, strict=True
  ):
    error = abs(float(metrics[f'loss_{name}']) / expected.item() - 1)
    quantity = f'loss of {name.replace("_", " ")}{label}'
    note_error(_MODEL, quantity, error, bound)


def _compare_gradients(note_error, label, grads, module, bound):
  found = layout.export(names.ACTION_PREDICTOR, grads['predictor'])
  errors = [
    np.abs(found[name] - p.grad.numpy()).max() / p.grad.abs().max().item()
    for name, p in module.named_parameters()
    if p.grad is not None
  ]
  assert len(errors) == len(found) - 2  # the camera's get none
  note_error(_MODEL, f'gradients{label}', max(errors), bound)


def test_the_file_comes_back_bit_for_bit(modules, weights, tmp_path):
  assert not weights.unused and weights.one_step
  assert isinstance(weights.predictor, ActionPredictor)
  assert weights.predictor.positions == weights.encoder.positions
  paths = [tmp_path / name for name in ('ours.pt', 'again.pt')]
  pytorch.write_checkpoint(paths[0], weights)
  write_workdir(epath.Path(tmp_path / 'run'), weights)
  pytorch.write_checkpoint(paths[1], read_weights(tmp_path / 'run'))
  for path in paths:
    content = torch.load(path)
    assert content['one_step'] is True
    for name, module in zip(('encoder', 'predictor'), modules, strict=True):
      expected = module.state_dict()
      found = content[name]
      assert sorted(found) == sorted(f'module.backbone.{k}' for k in expected)
      for key, value in expected.items():
        np.testing.assert_array_equal(found[f'module.backbone.{key}'], value)
  with pytest.raises(WeightsError, match='no V-JEPA 2-AC: give --format=jax'):
    save_pretrained(tmp_path / 'hf', weights)


def test_a_run_without_a_camera_is_loaded_strictly(modules, weights, tmp_path):
  params = dict(weights.predictor_params)
  del params['extrinsics_encoder']
  predictor = weights.predictor.clone(extrinsics_dim=0)
  ours = dataclasses.replace(
    weights, predictor=predictor, predictor_params=params
  )
  pytorch.write_checkpoint(tmp_path / 'a.pt', ours)
  found = torch.load(tmp_path / 'a.pt')['predictor']
  expected = modules[1].state_dict()
  assert {
    k.removeprefix('module.backbone.'): x.shape for k, x in found.items()
  } == {k: x.shape for k, x in expected.items()}
  assert not found['module.backbone.extrinsics_encoder.weight'].any()
  plain = dataclasses.replace(ours, predictor=predictor.clone(action_dim=2))
  with pytest.raises(WeightsError, match=r'have \(2, 7, 0\) .* \(7, 7, 6\)'):
    pytorch.write_checkpoint(tmp_path / 'b.pt', plain)


@pytest.mark.slow
def test_a_converted_run_keeps_its_kind_of_states(weights, tmp_path):
  first, second = (epath.Path(tmp_path / name) for name in ('a', 'b'))
  write_workdir(first, weights, {'state_kind': 'hidden', 'extrinsics': False})
  flags = {'from': str(first), 'to': str(second), 'format': 'jax'}
  flags |= dict.fromkeys(
    ('positions', 'predictor_positions', 'num_heads', 'predictor_heads')
  )
  flags |= {'resolution': 16, 'frames': 1}
  convert.main(SimpleNamespace(**flags, which='target_encoder', predictor=True))
  assert load_action_model(second).state_kind == 'hidden'


def test_the_file_is_read_strictly(modules, tmp_path):
  extra = {'module.backbone.pos': torch.zeros(1)}
  with pytest.raises(WeightsError, match=r"without a place: \['pos'\]"):
    path = _save(tmp_path / 'a.pt', modules, extra)
    pytorch.read_checkpoint(path, num_heads=2, predictor_heads=2)
  wrong = {'module.backbone.state_encoder.weight': torch.zeros(5, 7)}
  with pytest.raises(WeightsError, match='state_encoder.weight has shape'):
    path = _save(tmp_path / 'b.pt', modules, wrong)
    pytorch.read_checkpoint(path, num_heads=2, predictor_heads=2)


def test_the_names_are_those_of_the_published_file():
  model = ActionPredictor(
    out_width=6, width=8, depth=24, num_heads=1, extrinsics_dim=6
  )
  params = jax.eval_shape(model.init_params, jax.random.key(0))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
  found = layout.export(names.ACTION_PREDICTOR, params)
  expected = reference_ac.Predictor(6, 8, 24, 1, (1, 1)).state_dict()
  assert len(found) == 300
  assert {k: x.shape for k, x in found.items()} == {
    k: tuple(x.shape) for k, x in expected.items()
  }


def test_each_frame_is_encoded_alone(modules, weights, check_parity):
  shape = 2, 3, *(8 * side for side in _SIDES), 3
  frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  found = jax.jit(functools.partial(encode_frames, weights.encoder))(
    weights.encoder_params, frames
  )
  with torch.no_grad():
    expected = reference_ac.encode(modules[0], reference.normalize(frames))
  check_parity(
    _MODEL, 'features of frames', found.reshape(expected.shape), expected
  )


@pytest.mark.parametrize('camera', [(), ('extrinsics',)])
def test_outputs(camera, modules, weights, inputs, check_parity):
  with torch.no_grad():
    args = _to_torch(
      inputs, torch.float32, 'features', 'actions', 'states', *camera
    )
    args = [x[:, : _FRAMES - 1] for x in args]
    expected = reference_ac.normalize_tokens(modules[1](*args))
  predictor = weights.predictor, weights.predictor_params
  found = _predict(*predictor, inputs, jnp.float32, *camera)
  label = 'frames with a camera' if camera else 'frames'
  check_parity(_MODEL, label, found.reshape(expected.shape), expected)


def test_losses_and_gradients(modules, weights, inputs, note_error):
  module = copy.deepcopy(modules[1])
  frames, *others = _to_torch(
    inputs, torch.float32, 'features', 'actions', 'states'
  )
  frames = reference_ac.normalize_tokens(frames)
  losses = reference_ac.compute_losses(module, frames, *others)
  sum(losses).backward()
  run = _differentiate(weights, inputs, jnp.float32)
  (_, metrics), grads = run(_get_params(weights, jnp.float32))
  _compare_losses(note_error, metrics, losses, '', 1e-5)
  _compare_gradients(note_error, '', grads, module, 1e-5)


def test_in_double_precision(
  double, modules, weights, inputs, check_parity, note_error
):
  """The same to more digits; and the losses of twenty steps."""
  module = copy.deepcopy(modules[1]).double()
  frames, *others = _to_torch(
    inputs, torch.float64, 'features', 'actions', 'states'
  )
  frames = reference_ac.normalize_tokens(frames)
  with torch.no_grad():
    expected = module(*(x[:, : _FRAMES - 1] for x in (frames, *others)))
    expected = reference_ac.normalize_tokens(expected)
  features = frames.reshape(inputs['features'].shape).numpy()
  found = _predict(
    weights.predictor,
    weights.predictor_params,
    inputs | {'features': features},
    double,
  )
  assert found.dtype == np.float64
  check_parity(
    *(_MODEL, 'frames, float64', found.reshape(expected.shape), expected),
    1e-10,
  )
  decays = [[], []]
  for name, parameter in module.named_parameters():
    decays['bias' in name or parameter.ndim == 1].append(parameter)
  optimizer = torch.optim.AdamW(
    [{'params': decays[0], 'weight_decay': 0.04},
     {'params': decays[1], 'weight_decay': 0.0}],
    lr=1e-3,
  )  # fmt: skip
  run = _differentiate(weights, inputs, double)
  tx, rates = make_optimizer(), {'learning_rate': 1e-3, 'weight_decay': 0.04}
  apply = jax.jit(functools.partial(update, tx, rates=rates, max_norm=np.inf))
  params = _get_params(weights, double)
  state = tx.init(params)
  for step in range(20):
    losses = reference_ac.compute_losses(module, frames, *others)
    optimizer.zero_grad()
    sum(losses).backward()
    (loss, metrics), grads = run(params)
    if not step:
      _compare_losses(note_error, metrics, losses, ', float64', 1e-10)
      _compare_gradients(note_error, ', float64', grads, module, 1e-10)
    optimizer.step()
    params, state, _ = apply(params, state, grads, loss=loss)
  _compare_losses(note_error, metrics, losses, ', step 20, float64', 1e-8)
