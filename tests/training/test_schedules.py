"""Schedules against the published values."""

import numpy as np
import pytest

from configs import vjepa1, vjepa2
from vjepa_jax.tasks.program import make_schedules
from vjepa_jax.training.schedules import make_schedule


def _published(config):
  return make_schedules(config, config.total_steps, steps_per_epoch=1000.0)


def test_v1_stops_before_its_curves_end():
  schedules = _published(vjepa1.get_config('l16'))
  rate = schedules['learning_rate']
  assert float(rate(0)) == pytest.approx(2e-4 + 4.25e-4 / 12_000, rel=1e-5)
  assert float(rate(12_000 - 1)) == pytest.approx(6.25e-4, rel=1e-5)
  assert float(rate(90_000 - 1)) == pytest.approx(7.5e-5, rel=0.02)
  assert float(schedules['weight_decay'](0)) == pytest.approx(0.04, rel=1e-3)
  last = float(schedules['weight_decay'](90_000 - 1))
  assert last == pytest.approx(0.366, abs=1e-3)
  assert float(schedules['ema'](0)) == pytest.approx(0.998)
  assert float(schedules['ema'](90_000 - 1)) == pytest.approx(0.9996, abs=1e-5)


def test_v2_pretrains_at_a_constant_rate_and_cools_down_linearly():
  schedules = _published(vjepa2.get_config('g16'))
  for step in (12_000, 239_999):
    assert float(schedules['learning_rate'](step)) == pytest.approx(5.25e-4)
    assert float(schedules['ema'](step)) == pytest.approx(0.99925)
    assert float(schedules['weight_decay'](step)) == pytest.approx(0.04)
  cooldown = vjepa2.get_config('variant=g16,stage=cooldown_256')
  rate = _published(cooldown)['learning_rate']
  assert float(rate(0)) == pytest.approx(5.25e-4, rel=1e-3)
  assert float(rate(12_000 - 1)) == pytest.approx(1.06e-4, rel=0.01)


def test_cosine_is_half_a_period():
  schedule = make_schedule(
    'cosine', value=1.0, final=0.2, warmup_steps=10, total_steps=110
  )
  steps = np.arange(10, 111)
  expected = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * (steps - 10) / 100))
  actual = [float(schedule(s)) for s in steps]
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  assert float(schedule(500)) == pytest.approx(0.2)


def test_errors():
  with pytest.raises(ValueError, match="schedule 'step' is not one of"):
    make_schedule('step', value=1.0, total_steps=9)
  with pytest.raises(ValueError, match='20 warm-up steps do not fit'):
    make_schedule('cosine', value=1.0, warmup_steps=20, total_steps=9)
