"""Statistics that show a collapse."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.training import diagnostics


def _measure(features, microbatches=1):
  """Statistics of an 'encoder' whose features are its input."""
  encoder = SimpleNamespace(apply=lambda variables, video, dtype: video)
  diagnose = diagnostics.make_diagnose(encoder, microbatches)
  return diagnostics.summarize(diagnose(None, jnp.asarray(features)))


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
  features = position + rng.normal(size=(16, 1, 24))
  healthy = _measure(features)
  assert healthy['content_std'] > 0.5 and healthy['position_std'] < 0.8
  # Nothing of it depends on the parts.
  assert _measure(features, microbatches=4) == pytest.approx(healthy, rel=1e-4)
