"""Statistics that show a collapse."""

from types import SimpleNamespace

import numpy as np
import pytest

from vjepa_jax.training import diagnostics


def _measure(features):
  encoder = SimpleNamespace(apply=lambda variables, video: features)
  statistics = diagnostics.make_diagnose(encoder)(None, None)
  return diagnostics.summarize(statistics)


def test_effective_rank_counts_the_directions_in_use():
  rng = np.random.default_rng(0)
  directions = np.linalg.qr(rng.normal(size=(16, 16)))[0]
  for rank in (1, 4, 16):
    x = rng.normal(size=(4000, rank)) @ directions[:rank]
    covariance = x.T @ x / len(x)
    measured = diagnostics.compute_effective_rank(covariance)
    assert measured == pytest.approx(rank, rel=0.02)
  assert diagnostics.compute_effective_rank(np.zeros((4, 4))) == 1.0


def test_features_that_carry_only_position_are_told_apart():
  rng = np.random.default_rng(0)
  position = np.broadcast_to(rng.normal(size=(1, 32, 24)), (16, 32, 24))
  collapsed = _measure(position)
  assert collapsed['content_std'] < 1e-3
  assert collapsed['position_std'] > 0.9
  healthy = _measure(rng.normal(size=(16, 32, 24)))
  assert healthy['content_std'] > 0.9 and healthy['position_std'] < 0.4
