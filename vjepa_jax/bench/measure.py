"""Alternating runs, their medians and ratios, and how they are written."""

from collections.abc import Callable, Mapping, Sequence
import json
import os
from pathlib import Path
import platform
import statistics
import time
from typing import Any

import numpy as np

from vjepa_jax.progress import make_bar

Times = dict[str, list[float]]

OURS = 'ours'


def alternate(
  runs: Mapping[str, Callable[[int], Any]],
  rounds: int,
  *,
  clock: Callable[[], float] = time.perf_counter,
  label: str = '',
) -> Times:
  """Times functions in turn, so that a busy machine slows all of them alike.

  Each round starts with another function: none always runs after the same one.
  A first round is not counted.

  Args:
    runs: by name, functions of the round, which is the same for all.
    rounds: how often each is timed.
    clock: returns seconds.
    label: of the progress bar.

  Returns:
    Seconds of each round, by name.
  """
  names = list(runs)
  times = {name: [] for name in names}
  for i in make_bar(range(rounds + 1), desc=label, leave=False):
    start = i % len(names)
    for name in names[start:] + names[:start]:
      begin = clock()
      runs[name](max(i - 1, 0))
      if i:
        times[name].append(clock() - begin)
  return times


def summarize(seconds: Sequence[float]) -> dict[str, float]:
  """Returns median, minimum and quartiles."""
  first, median, third = np.percentile(seconds, [25, 50, 75]).tolist()
  return {
    'median': median,
    'min': float(np.min(seconds)),
    'quartile_1': first,
    'quartile_3': third,
  }


def compare(times: Times) -> dict[str, Any]:
  """Compares our times with those of each peer.

  Args:
    times: seconds of each round, by name, `OURS` among them.

  Returns:
    'ratio': for each peer the median over rounds of ours / peer, under 1 is
    faster; 'ours': see `summarize`; 'peer': the same for each peer; 'rounds'.
  """
  ours = np.asarray(times[OURS])
  peers = {name: values for name, values in times.items() if name != OURS}
  return {
    'ratio': {name: float(np.median(ours / t)) for name, t in peers.items()},
    'ours': summarize(ours),
    'peer': {name: summarize(t) for name, t in peers.items()},
    'rounds': len(ours),
  }


def join(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Joins the comparisons of several cases.

  Returns:
    'ratio': for each peer the geometric mean over its cases; 'ours' and 'peer'
    of each case, by name; 'cases', as they are.
  """
  ratios = {}
  for case in cases.values():
    for peer, ratio in case['ratio'].items():
      ratios.setdefault(peer, []).append(ratio)
  return {
    'ratio': {k: statistics.geometric_mean(v) for k, v in ratios.items()},
    'ours': {name: case['ours'] for name, case in cases.items()},
    'peer': {name: case['peer'] for name, case in cases.items()},
    'cases': cases,
  }


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
  """Prints rows in columns; numbers to three digits."""
  cells = [list(header)]
  for row in rows:
    cells.append([f'{c:.3g}' if isinstance(c, float) else str(c) for c in row])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for row in cells:
    line = [row[0].ljust(widths[0])]
    line += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
    print('  '.join(line).rstrip())


def print_cases(
  cases: Mapping[str, Mapping[str, Any]],
  title: str,
  convert: Callable[[float], float],
) -> None:
  """Prints a line a case: ours, each peer, and the ratios of times.

  Args:
    cases: Comparisons, by name.
    title: What is printed of the medians,
    convert: and how seconds become that.
  """
  peers = sorted({peer for case in cases.values() for peer in case['peer']})
  rows = []
  for name, case in cases.items():
    times = [case['ours'], *(case['peer'][peer] for peer in peers)]
    values = [convert(t['median']) for t in times]
    rows.append([name, *values, *(case['ratio'][peer] for peer in peers)])
  print_table([title, OURS, *peers, *(f'ours/{peer}' for peer in peers)], rows)


def write_result(path: str | None, result: Mapping[str, Any]) -> None:
  """Writes a result with what numbers depend on as JSON, if asked to."""
  import jax  # noqa: PLC0415 - decoding workers import this package too

  machine = {
    'cores': len(os.sched_getaffinity(0)),
    'load': round(os.getloadavg()[0], 2),
    'machine': platform.machine(),
    'python': platform.python_version(),
    'jax': jax.__version__,
  }
  if path:
    text = json.dumps({**result, 'machine': machine}, indent=2)
    Path(path).write_text(text + '\n')
