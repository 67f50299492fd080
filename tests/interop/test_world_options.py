"""What a run predicts, as its config.json says it, now and in older runs."""

import pytest

from vjepa_jax.interop.world import _read_objective


@pytest.mark.parametrize(
  'objective,expected',
  [
    ({}, ('ema', 'clip', 'layer')),
    (
      {'kind': 'vjepa', 'vjepa': {'target_norm': 'position'}},
      ('ema', 'clip', 'position'),
    ),
    (
      {'kind': 'salt', 'vjepa': {}, 'salt': {'teacher': ''}},
      ('pixels', 'clip', 'layer'),
    ),
    (
      {'kind': 'salt', 'vjepa': {}, 'salt': {'teacher': 'runs/a'}},
      ('frozen', 'clip', 'layer'),
    ),
    # Before objectives had a kind.
    (
      {'targets': 'frozen', 'target_view': 'targets', 'target_norm': 'layer'},
      ('frozen', 'targets', 'layer'),
    ),
  ],
)
def test_objectives_of_all_ages_are_read(objective, expected):
  options = _read_objective({'objective': objective})
  names = 'targets', 'target_view', 'target_norm'
  assert tuple(options[name] for name in names) == expected
