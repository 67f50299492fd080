"""`bench compile`: time to the first step, cold and with a cache."""

import argparse
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

from vjepa_jax.bench import measure
from vjepa_jax.errors import UserError

OPTIONS = {
  'config': {
    'default': 'configs/vjepa2.py:g16',
    'help': 'recipe, run as a smoke',
  },
}


def time_first_step(
  config: str, workdir: Path, cache: Path | None = None
) -> float:
  """Starts a smoke run and waits for the metrics of its first step.

  Args:
    config: Recipe.
    workdir: Fresh directory of the run.
    cache: Compilation cache to use; None for the default, which is in the
      workdir and thus empty.

  Returns:
    Seconds from the start of the process.

  Raises:
    UserError: The run ended before its first step.
  """
  environment = dict(os.environ)
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  if cache is not None:
    environment['JAX_COMPILATION_CACHE_DIR'] = str(cache)
  command = [sys.executable, '-m', 'vjepa_jax.tools.train']
  command += [f'--config={config}', '--config.smoke=True']
  command += [f'--workdir={workdir}']
  begin = time.perf_counter()
  with open(f'{workdir}.log', 'w+') as log:
    process = subprocess.Popen(
      command, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    try:
      while not has_first_step(workdir / 'metrics.jsonl'):
        if process.poll() is not None:
          log.seek(0)
          lines = log.read().strip().splitlines() or ['no output']
          raise UserError(f'{config} did not start: {lines[-1]}')
        time.sleep(0.02)
      seconds = time.perf_counter() - begin
      process.wait()
    finally:
      process.kill()
      process.wait()
  return seconds


def has_first_step(path: Path) -> bool:
  """Tells whether a file of metrics has a whole line with a loss."""
  return path.exists() and '"loss"' in path.read_text().rpartition('\n')[0]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Times cold and warm starts in turn."""
  rounds = arguments.rounds or (1 if arguments.quick else 3)
  times = {measure.OURS: [], 'cold': []}
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    for i in measure.make_bar(range(rounds), desc='compile', leave=False):
      cold = folder / f'cold_{i}'
      times['cold'].append(time_first_step(arguments.config, cold))
      # The cache that the cold run left where it is by default.
      cache = cold / 'compilation_cache'
      if not any(cache.glob('*')):
        raise UserError(f'the cold run left no cache in {cache.name}')
      times[measure.OURS].append(
        time_first_step(arguments.config, folder / f'warm_{i}', cache)
      )
  result = {'unit': 's', 'config': arguments.config, **measure.compare(times)}
  print(
    f'time to the first step, {arguments.config} as a smoke run; ours: warm'
  )
  measure.print_cases({'': result}, 'seconds', lambda t: t)
  print(f'warm / cold: {result["ratio"]["cold"]:.2f}')
  return result
