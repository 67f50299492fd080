"""Teachers: of pixels in the two stages of SALT, and of V-JEPA 2.1."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from tiny import make_config

from vjepa_jax.errors import UserError
from vjepa_jax.interop.load import read_weights
from vjepa_jax.tasks import pretrain as pretraining
from vjepa_jax.training.telemetry import read_metrics


def _make_config(videos, changes):
  schedule = {'checkpoint.every_steps': 2, 'checkpoint.keep': 3}
  kind = {'objective.kind': 'salt', 'total_steps': 4}
  return make_config(videos, schedule | kind | changes)


@pytest.fixture(scope='module')
def teacher(toy_videos, tmp_path_factory):
  """Workdir of a teacher that pixels have taught, wider than its student."""
  workdir = tmp_path_factory.mktemp('teacher')
  changes = {'encoder.size': 'mini', 'encoder.init_std': 0.0}
  config = _make_config(toy_videos, changes)
  assert pretraining.pretrain(config, workdir) is not None
  return workdir


def _make_student(videos, teacher):
  changes = {'objective.salt.teacher': str(teacher), 'fsdp': 2}
  return _make_config(videos, changes)


def test_teacher_of_pixels_is_an_encoder_with_a_predictor_of_pixels(teacher):
  weights = read_weights(teacher)
  assert weights.encoder.width == 128
  pixels = 3 * np.prod(weights.encoder.tubelet)
  assert weights.predictor.out_width == pixels
  assert weights.predictor_params['proj']['bias'].shape == (pixels,)
  losses = [line['loss'] for line in read_metrics(teacher) if 'loss' in line]
  assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.slow
def test_student_resumes_with_the_teacher_it_had(toy_videos, teacher, tmp_path):
  config, tmp_path = _make_student(toy_videos, teacher), tmp_path / 'student'
  state = pretraining.pretrain(config, tmp_path)
  expected = read_weights(teacher, with_predictor=False).encoder_params
  jax.tree.map(np.testing.assert_array_equal, state.frozen, expected)
  assert state.params['predictor']['proj']['bias'].shape == (128,)
  saved = {p.name for p in (tmp_path / 'checkpoints' / '4').iterdir()}
  assert {'params', 'target', 'opt_state'} <= saved and 'frozen' not in saved
  student = read_weights(tmp_path, with_predictor=False)
  assert student.encoder.width == 48
  jax.tree.map(
    np.testing.assert_array_equal, student.encoder_params, state.target
  )

  # The teacher goes on for two steps; the student, interrupted, does not care.
  later = tmp_path / 'later'
  shutil.copytree(teacher, later)
  record = tmp_path / 'teacher.json'
  record.write_text(json.dumps({'path': str(later), 'step': 4}))
  longer = _make_config(toy_videos, {'encoder.size': 'mini', 'total_steps': 6})
  pretraining.pretrain(longer, later)
  shutil.rmtree(tmp_path / 'checkpoints' / '4')
  again = pretraining.pretrain(_make_student(toy_videos, later), tmp_path)
  assert int(again.step) == 4
  for name in ('params', 'target', 'frozen'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(again, name), getattr(state, name)
    )

  with pytest.raises(ValueError, match='use another --workdir'):
    pretraining.pretrain(config, tmp_path)
  shutil.rmtree(later / 'checkpoints' / '4')
  with pytest.raises(ValueError, match='no longer holds step 4, only'):
    pretraining.pretrain(_make_student(toy_videos, later), tmp_path)


@pytest.mark.slow
def test_the_second_stage_of_distillation_goes_on_from_the_average(
  toy_videos, teacher, tmp_path
):
  changes = {
    'objective.kind': 'vjepa21',
    'objective.vjepa21.teacher': str(teacher),
    'encoder.levels': True,
  }
  first, second = tmp_path / 'first', tmp_path / 'second'
  state = pretraining.pretrain(_make_config(toy_videos, changes), first)
  predictor = state.params['predictor']
  # The last level of the teacher, of whatever level the student has.
  assert predictor['embed']['kernel'].shape[0] == 48
  for name in ('proj', 'proj_context'):
    assert predictor[name]['bias'].shape == (128,)
  # Norms of levels that nothing looks at stay as they are, as released.
  assert (state.params['encoder']['norm_0']['scale'] == 1).all()
  assert (state.params['encoder']['norm']['scale'] != 1).any()

  still = {'total_steps': 1, 'learning_rate.value': 0.0}
  changes |= still | {'learning_rate.start': 0.0, 'init_average': True}
  with pytest.raises(UserError, match='which is empty: give the workdir'):
    pretraining.pretrain(_make_config(toy_videos, changes), second)
  changes['init_from'] = str(first)
  after = pretraining.pretrain(_make_config(toy_videos, changes), second)
  close = functools.partial(np.testing.assert_allclose, atol=1e-7)
  for found in (after.params['encoder'], after.target):
    jax.tree.map(close, found, state.target)
  jax.tree.map(
    np.testing.assert_array_equal, after.params['predictor'], predictor
  )


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      {'objective.salt.teacher': '/no/such/run'},
      'salt.teacher: /no/such/run holds no checkpoints: is it',
    ),
    ({'encoder.tubelet': (2, 4, 8)}, r'config.encoder.tubelet is \(2, 4, 8\)'),
    ({'objective.kind': 'noise'}, "objective.kind 'noise' is not one of"),
  ],
)
def test_mistakes_fail_before_anything_is_compiled(
  toy_videos, teacher, tmp_path, changes, message
):
  config = _make_student(toy_videos, teacher)
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    pretraining.pretrain(config, tmp_path)
  assert not (tmp_path / 'checkpoints').exists()
