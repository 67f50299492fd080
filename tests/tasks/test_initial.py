"""Runs that go on from weights of other systems, and which they refuse."""

import dataclasses

import jax
import numpy as np
from processes import finish
import pytest
import tiny

from vjepa_jax.interop import huggingface, layout, names
from vjepa_jax.interop.layout import Weights
from vjepa_jax.interop.load import make_abstract, read_weights
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.tasks.initial import take_over
from vjepa_jax.tasks.program import build_objective, build_program
from vjepa_jax.tools.convert import write_workdir


def _make_config(positions='rope_tiled', **changes):
  config = tiny.get_config('videos')
  config.encoder.update(positions=positions, pixel_norm='imagenet')
  config.update_from_flattened_dict(changes)
  return config


def _make_weights(positions='rope_tiled'):
  """Makes a released model: that of the recipe, with three mask tokens."""
  config = _make_config(positions, **{'predictor.num_mask_tokens': 3})
  objective = build_objective(config, make_mesh(1))
  encoder, predictor = objective.encoder, objective.predictor
  rng = np.random.default_rng(0)
  encoder_params, predictor_params = jax.tree.map(
    lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32),
    (make_abstract(encoder), make_abstract(predictor, encoder.width)),
  )
  return Weights(
    encoder, encoder_params, predictor, predictor_params, (), 32, 4
  )


def _take_over(source, config):
  return take_over(str(source), build_program(config, make_mesh(1), 9, 1), 0)


def _check(state, weights, target=None):
  """Checks that all of a state but the moments is what was released."""
  predictor = dict(weights.predictor_params)
  predictor['mask_tokens'] = predictor['mask_tokens'][:1]
  target = weights.encoder_params if target is None else target
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.target),
    ({'encoder': weights.encoder_params, 'predictor': predictor}, target),
  )


@pytest.mark.slow
def test_pretraining_goes_on_from_a_folder(launcher, tmp_path):
  weights = _make_weights()
  huggingface.save_pretrained(tmp_path / 'released', weights)
  output = finish(
    launcher.start(
      tmp_path / 'run',
      f'--config.init_from={tmp_path / "released"}',
      '--config.encoder.positions=rope_tiled',
      '--config.encoder.pixel_norm=imagenet',
      '--config.total_steps=1',
      '--config.learning_rate.warmup_steps=0',
      '--config.learning_rate.value=1e-9',
      '--config.learning_rate.final=1e-9',
    )
  )
  assert 'took over encoder and predictor of' in output
  for which in ('encoder', 'target_encoder'):
    found = read_weights(tmp_path / 'run', which=which)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      found.encoder_params,
      weights.encoder_params,
    )
  tokens = found.predictor_params['mask_tokens']
  np.testing.assert_allclose(
    tokens, weights.predictor_params['mask_tokens'][:1], atol=1e-6
  )


def test_converted_weights_start_without_moments(tmp_path):
  weights = _make_weights()
  write_workdir(tmp_path, weights)
  state = _take_over(tmp_path, _make_config())
  _check(state, weights)
  assert int(state.step) == 0
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert moments and not any(np.any(x) for x in moments)


def test_an_official_file_has_a_target_of_its_own(tmp_path):
  torch = pytest.importorskip('torch', reason='the extra parity has torch')
  weights = _make_weights('sincos')
  target = jax.tree.map(lambda x: x + 1, weights.encoder_params)
  content = {}
  for name, family, params in (
    ('encoder', names.ENCODER, weights.encoder_params),
    ('target_encoder', names.ENCODER, target),
    ('predictor', names.PREDICTOR, weights.predictor_params),
  ):
    tensors = layout.export(family, params, tubelet=(2, 8, 8))
    content[name] = {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}
  table = torch.zeros(1, 128, 48)
  for name in ('encoder', 'target_encoder'):
    content[name]['pos_embed'] = table
  # More than two mask tokens are of V-JEPA 2.
  del content['predictor']['mask_tokens.2']
  torch.save(content, tmp_path / 'released.pt')
  _check(
    _take_over(tmp_path / 'released.pt', _make_config('sincos')),
    weights,
    target,
  )


def test_without_a_predictor_that_starts_untrained(tmp_path, caplog):
  weights = _make_weights()
  alone = dataclasses.replace(weights, predictor=None, predictor_params=None)
  write_workdir(tmp_path, alone)
  with caplog.at_level('INFO', logger='absl'):
    state = _take_over(tmp_path, _make_config())
  jax.tree.map(
    np.testing.assert_array_equal,
    state.params['encoder'],
    weights.encoder_params,
  )
  assert 'untrained: predictor' in caplog.text
  assert not np.any(state.params['predictor']['mask_tokens'])


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      {'encoder.size': 'mini'},
      'has encoder width 48, and this config 128: use',
    ),
    (
      {'encoder.positions': 'sincos'},
      "encoder positions 'rope_tiled', and this config 'sincos'",
    ),
    ({'predictor.depth': 2}, 'has predictor depth 1, and this config 2'),
    (
      {'predictor.num_mask_tokens': 4},
      'predictor num_mask_tokens 3, and this config 4',
    ),
  ],
)
def test_weights_of_another_model_are_refused(
  changes, message, tmp_path_factory
):
  source = tmp_path_factory.getbasetemp() / 'refused'
  if not source.exists():
    write_workdir(source, _make_weights())
  with pytest.raises(ValueError, match=message) as error:
    _take_over(source, _make_config(**changes))
  assert '\n' not in str(error.value)
