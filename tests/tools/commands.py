"""Runs commands, in this process and in one of their own."""

import os
from pathlib import Path
import subprocess
import sys
from types import ModuleType

from vjepa_jax.tools import command

_RECORDED = Path(__file__).parents[1] / 'training' / 'recorded'


def run_command(module: ModuleType, *arguments: str) -> int | None:
  """Runs a module of `vjepa_jax.tools` as its command line would."""
  options, words = command.parse(module.main, module.define_flags, arguments)
  return module.main(options, *words)


def start_command(name: str, *arguments) -> subprocess.CompletedProcess:
  """Runs a command of that name as a user does, on the CPU."""
  return subprocess.run(
    [sys.executable, '-m', f'vjepa_jax.tools.{name}', *map(str, arguments)],
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


def make_workdir(path: Path, recorded: str) -> Path:
  """Makes a workdir with the metrics of a recorded run."""
  path.mkdir(parents=True, exist_ok=True)
  lines = (_RECORDED / f'{recorded}.jsonl').read_text().splitlines(True)
  (path / 'metrics.jsonl').write_text(''.join(lines[1:]))
  return path
