"""Masks that someone chose: what is hidden, and what cannot be."""

import numpy as np
import pytest

from vjepa_jax.world.masks import choose_hidden

BOX = (0.25, 0.25, 0.5, 0.5)


@pytest.mark.parametrize(
  'hide,steps,expected',
  [
    ('future', 1, range(4, 12)),
    ('future', 2, range(8, 12)),
    ('past', 1, range(8)),
    ('past', 2, range(4)),
  ],
)
def test_time_is_split_at_a_step(hide, steps, expected):
  visible, hidden = choose_hidden((3, 2, 2), hide, steps, BOX)
  assert hidden.tolist() == list(expected)
  assert sorted([*visible, *hidden]) == list(range(12))


@pytest.mark.parametrize('steps', [0, 1])
def test_a_region_is_hidden_from_a_step_on(steps):
  visible, hidden = choose_hidden((2, 4, 4), 'region', steps, BOX)
  marked = np.zeros((2, 4, 4), bool)
  marked.reshape(-1)[hidden] = True
  expected = np.zeros((2, 4, 4), bool)
  expected[steps:, 1:3, 1:3] = True
  np.testing.assert_array_equal(marked, expected)
  assert len(visible) + len(hidden) == 32


@pytest.mark.parametrize(
  'hide,steps,box,message',
  [
    ('future', 0, BOX, 'can show 1 to 2 of them, not 0'),
    ('future', 3, BOX, 'can show 1 to 2 of them, not 3'),
    ('region', -1, BOX, 'can show 0 to 2 of them, not -1'),
    ('region', 0, (0, 0, 1, 1), 'covers 4 of 4 tubelets'),
    ('region', 0, (0.1, 0.1, 0.1, 0.1), 'covers 0 of 4 tubelets'),
    ('region', 0, (0.5, 0, 0.6, 1), 'must lie within the frame'),
    ('sideways', 1, BOX, 'is not one of'),
  ],
)
def test_masks_that_hide_all_or_nothing(hide, steps, box, message):
  with pytest.raises(ValueError, match=message):
    choose_hidden((3, 2, 2), hide, steps, box)
