"""Comparisons with reference code, and their table."""

import json
import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope='session')
def note_error():
  """Asserts that an error is within its bound, and notes both.

  Rows go to the file that PARITY_JSON names.
  """
  rows = []

  def note(model, quantity, error, bound):
    row = {'model': model, 'quantity': quantity}
    rows.append(row | {'error': float(error), 'bound': bound})
    assert error <= bound, f'{model}, {quantity}: {error:.1e} > {bound:.1e}'

  yield note
  if rows and 'PARITY_JSON' in os.environ:
    path = Path(os.environ['PARITY_JSON'])
    earlier = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps(earlier + rows, indent=2) + '\n')


@pytest.fixture(scope='session')
def check_parity(note_error):
  """Checks and notes the error of an array.

  It is the largest absolute difference relative to the root mean square of
  what is expected.
  """

  def check(model, quantity, actual, expected, bound=1e-5):
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    scale = np.sqrt(np.mean(expected**2))
    note_error(model, quantity, np.abs(actual - expected).max() / scale, bound)

  return check


@pytest.fixture(scope='session')
def randomize():
  """Fills every parameter of a torch module, biases and norms too."""
  torch = pytest.importorskip('torch', reason='the extra parity has torch')

  def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for name, value in module.named_parameters():
        if not value.requires_grad:
          continue
        mean = float('norm' in name and name.endswith('weight'))
        value.copy_(mean + 0.1 * torch.randn(value.shape, generator=generator))
    return module.eval()

  return fill
