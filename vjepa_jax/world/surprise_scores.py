"""Scores of surprise: does the impossible film of a pair surprise more?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vjepa_jax.sets.pairs import Pair

# How the surprise of windows makes the score of a film.
SCORES = ('max', 'mean')
MODELS = {
  'pretrained': 'pretrained',
  'random_init': 'random init',
  'pixels': 'pixels stay',
}


def score_pairs(
  possible: np.ndarray, impossible: np.ndarray, groups: Sequence[str]
) -> dict[str, float]:
  """Scores pairs of films by which of the two surprises more.

  Args:
    possible, impossible: Score of each film of each pair, `[N]`.
    groups: The set that each pair belongs to, `[N]`.

  Returns:
    'pairs', their number; 'accuracy', the share of them in which the impossible
    film surprises more, where ties count half (a difference within rounding is
    a tie); 'error', its standard error, over sets, as the pairs of a set are
    not independent, NaN for a single one; 'sets', the share of sets whose
    impossible films together surprise more: what the states of a set differ in
    by themselves cancels there.
  """
  right = _compare(possible, impossible)
  accuracy = right.mean()
  _, members = np.unique(groups, return_inverse=True)
  # Of a ratio of sums over clusters.
  deviations = np.bincount(members, right - accuracy)
  count = len(deviations)
  error = np.nan
  if count > 1:
    variance = np.square(deviations).sum() * count / (count - 1)
    error = np.sqrt(variance) / len(right)
  sums = [np.bincount(members, scores) for scores in (possible, impossible)]
  return {
    'pairs': len(right),
    'accuracy': float(accuracy),
    'error': float(error),
    'sets': float(_compare(*sums).mean()),
  }


def _compare(possible: np.ndarray, impossible: np.ndarray) -> np.ndarray:
  """1 where the impossible one is greater, .5 where they are equal, else 0."""
  equal = np.isclose(possible, impossible, rtol=1e-5, atol=0)
  return np.where(equal, 0.5, impossible > possible)


def score_set(
  found: Sequence[Pair], curves: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
  """Scores all pairs, and those of each property and kind.

  `curves` are the surprise over windows by file; the result is by score (max,
  mean) and row, see `score_pairs`.
  """
  rows = {p.property: [] for p in found}
  rows |= {'in plain sight': [], 'behind a screen': [], 'all': []}
  for pair in found:
    rows['all'].append(pair)
    rows[pair.property].append(pair)
    if pair.screen is not None:
      kind = 'behind a screen' if pair.screen else 'in plain sight'
      rows[kind].append(pair)
      rows.setdefault(f'{pair.property} {kind}', []).append(pair)
  results = {}
  for score in SCORES:
    reduce = getattr(np, score)
    results[score] = {
      row: score_pairs(
        np.array([reduce(curves[p.possible]) for p in members]),
        np.array([reduce(curves[p.impossible]) for p in members]),
        [p.group for p in members],
      )
      for row, members in rows.items()
      if members
    }
  return results


def format_table(results: Mapping[str, Any]) -> str:
  """Formats the accuracies, rows by models, each score by itself."""
  lines = []
  for score in SCORES:
    rows = results['pretrained'][score]
    title = f'pairwise accuracy, {score} over windows'
    names = ''.join(name.rjust(16) for name in MODELS.values())
    lines += ['', f'{title:42}pairs{names}']
    for row, first in rows.items():
      cells = [results[name][score][row] for name in MODELS]
      cells = (f'{c["accuracy"]:9.3f} ± {c["error"]:.3f}' for c in cells)
      lines.append(f'{row:42}{first["pairs"]:5}{"".join(cells)}')
  return '\n'.join(lines) + '\n'
