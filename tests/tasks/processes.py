"""Runs main.py as a user does, as one process or as several."""

import json
import os
from pathlib import Path
import socket
import subprocess
import sys
import time

ROOT = Path(__file__).parents[2]
TINY = ROOT / 'tests' / 'tasks' / 'tiny.py'


class Launcher:
  """Starts main.py on the tiny recipe; ends what a test leaves running."""

  def __init__(self, toy_videos: Path, compilation_cache: Path):
    self._config = f'{TINY}:{toy_videos}'
    self._cache = compilation_cache
    self._processes = []

  def start(self, workdir, *flags, devices=1, config=None):
    """Starts one process with so many devices."""
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
      'JAX_COMPILATION_CACHE_DIR': str(self._cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
      # Compiling takes half as long; of several processes only the first finds
      # its programs in the cache.
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    process = subprocess.Popen(
      [
        sys.executable,
        'main.py',
        f'--config={config or self._config}',
        f'--workdir={workdir}',
        *flags,
      ],
      cwd=ROOT,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    self._processes.append(process)
    return process

  def start_two(self, workdir, *flags, devices=1, only_second=(), config=None):
    """Starts two processes of one run; some flags for the second alone."""
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = probe.getsockname()[1]
    return [
      self.start(
        workdir,
        f'--coordinator=127.0.0.1:{port}',
        '--num_processes=2',
        f'--process_index={i}',
        *flags,
        *(only_second if i else ()),
        devices=devices,
        config=config,
      )
      for i in range(2)
    ]

  def close(self):
    for process in self._processes:
      process.kill()
      process.wait()


def finish(process, code=0):
  """Waits for the end; returns what was printed."""
  output, _ = process.communicate(timeout=300)
  assert process.returncode == code, output
  return output


def finish_all(processes, code=0):
  return [finish(process, code) for process in processes]


def wait_for_step(workdir, step):
  """Waits until the checkpoint of a step is there."""
  deadline = time.monotonic() + 200
  while not (workdir / 'checkpoints' / str(step)).exists():
    assert time.monotonic() < deadline, 'no checkpoint came'
    time.sleep(0.02)


def read_losses(workdir):
  """Reads the loss of every step; none may be there twice."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  lines = [line for line in map(json.loads, lines) if 'loss' in line]
  steps = [line['step'] for line in lines]
  assert steps == sorted(set(steps))
  return {line['step']: line['loss'] for line in lines}
