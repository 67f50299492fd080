"""Batches of one shape give what all rows at a time would give."""

import jax
import numpy as np
import pytest

from vjepa_jax.evaluation import batching
from vjepa_jax.parallel.mesh import make_mesh


def test_rows_keep_their_order_and_padding_is_left_out():
  shapes = []

  def scale(params, rows):
    shapes.append(rows.shape)
    return rows * params

  extract = batching.make_extract(scale, make_mesh(2), 8, 'batch size')
  rows = np.random.default_rng(0).normal(size=(19, 3)).astype(np.float32)
  for count in (19, 16, 3):
    found = extract(np.float32(2), rows[:count])
    np.testing.assert_array_equal(found, 2 * rows[:count])
  assert shapes == [(8, 3)]  # one program


def test_the_next_batch_is_put_together_while_one_runs():
  events = []

  def load():
    for i in range(3):
      events.append(f'load {i}')
      yield {'x': np.full((8, 2), i, np.float32)}

  map_batches = batching.make_map_batches(
    lambda _, batch: batch, make_mesh(), 8, 'batch size'
  )
  for batch in map_batches(None, load()):
    events.append(f'done {batch["x"][0, 0]:.0f}')
  wanted = ['load 0', 'load 1', 'done 0', 'load 2', 'done 1', 'done 2']
  assert events == wanted


def test_a_batch_that_does_not_split_is_named():
  assert jax.device_count() == 8
  with pytest.raises(ValueError, match='probe.batch_size 12 is not divisible'):
    batching.make_map_batches(None, make_mesh(), 12, 'config.probe.batch_size')
