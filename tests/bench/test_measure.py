"""Alternation, medians, ratios and what is written."""

import sys

import pytest

from vjepa_jax.bench import measure
from vjepa_jax.bench.__main__ import main


def test_alternates_and_times_each_run():
  now, calls = [0.0], []

  def make(name, seconds):
    def run(i):
      calls.append((name, i))
      now[0] += seconds * (i + 1)

    return run

  times = measure.alternate(
    {'ours': make('ours', 1), 'peer': make('peer', 10)},
    rounds=3,
    clock=lambda: now[0],
  )
  assert times == {'ours': [1, 2, 3], 'peer': [10, 20, 30]}
  # The warm-up, then each round beginning with the other.
  assert calls == [
    ('ours', 0), ('peer', 0), ('peer', 0), ('ours', 0),
    ('ours', 1), ('peer', 1), ('peer', 2), ('ours', 2),
  ]  # fmt: skip


def test_ratio_is_the_median_of_the_rounds_ratios():
  # A slow moment of the machine hits both in the second round.
  times = {'ours': [1, 100, 3], 'a': [2, 400, 3], 'b': [1, 100, 1]}
  result = measure.compare(times)
  assert result['ratio'] == {'a': 0.5, 'b': 1.0}
  assert result['rounds'] == 3
  assert result['ours'] == {
    'median': 3, 'min': 1, 'quartile_1': 2, 'quartile_3': 51.5,
  }  # fmt: skip
  assert result['peer']['a']['median'] == 3


def test_joins_cases_by_the_geometric_mean():
  cases = {
    'x': {'ratio': {'a': 0.25, 'b': 3.0}, 'ours': 1, 'peer': 2},
    'y': {'ratio': {'a': 1.0}, 'ours': 3, 'peer': 4},
  }
  result = measure.join(cases)
  assert result['ratio'] == pytest.approx({'a': 0.5, 'b': 3.0})
  assert result['ours'] == {'x': 1, 'y': 3} and result['peer']['y'] == 4


def test_prints_columns(capsys):
  measure.print_table(['', 'x'], [['long name', 0.12345], ['b', 7]])
  assert capsys.readouterr().out.splitlines() == [
    '               x',
    'long name  0.123',
    'b              7',
  ]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['data', '--rounds=0'], 'error: --rounds=0 is not positive'),
    (['data', '--videos=none/*.mp4'], 'matches no file'),
    (['data', '--step_seconds=-1'], 'must be positive'),
    (['step', '--batch_size=0'], 'is too few'),
  ],
)
def test_says_what_is_wrong_in_one_line(capsys, arguments, message):
  assert main(arguments) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1


def test_names_the_extra_of_what_is_missing(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'vjepa_jax.bench.torch_step', None)
  assert main(['step', '--quick']) == 2
  assert "pip install -e '.[parity]'" in capsys.readouterr().err
