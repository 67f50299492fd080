"""Runs of toy size in processes of their own, for `bench faults`."""

from collections.abc import Sequence
import contextlib
import os
from pathlib import Path
import re
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from vjepa_jax.training.telemetry import read_metrics

# After which the processes of a killed run shall have ended.
ORPHAN_SECONDS = 10
_RECIPE = (
  '--config=configs/small.py',
  '--config.task=pretrain',
  '--config.encoder.size=nano',
  '--config.data.batch_size=8',
  '--config.learning_rate.warmup_steps=1',
  '--config.checkpoint.every_steps=10',
  '--config.checkpoint.keep=99',
  '--config.diagnose_every_steps=0',
  '--config.probe.every_steps=0',
  '--config.log_every_steps=1',
)


def start(
  workdir: Path, flags: Sequence[str], processes: int = 1
) -> list[subprocess.Popen]:
  """Starts a run on two devices, as one process or two, each its own group."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(2 // processes),
    'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  command = [sys.executable, '-m', 'vjepa_jax.tools.train', *_RECIPE]
  command += [f'--workdir={workdir}', *flags]  # which may name another
  ranks = [[]]
  if processes > 1:
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = probe.getsockname()[1]
    command += [f'--coordinator=127.0.0.1:{port}']
    command += [f'--num_processes={processes}']
    ranks = [[f'--process_index={i}'] for i in range(processes)]
  with open(f'{workdir}.log', 'a') as log:
    return [
      subprocess.Popen(
        [*command, *rank],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
      for rank in ranks
    ]


def train(workdir: Path, flags: Sequence[str]) -> int:
  """Runs to the end; returns the exit code."""
  (process,) = start(workdir, flags)
  return process.wait()


def read_result(workdir: Path) -> tuple[dict[int, float], bytes]:
  """Reads the loss of each step, and the bytes of the last checkpoint."""
  losses = {m['step']: m['loss'] for m in read_metrics(workdir)}
  device = jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0])
  with ocp.training.Checkpointer(workdir / 'checkpoints') as checkpointer:
    step = checkpointer.latest.step
    found = checkpointer.checkpointables_metadata(step).metadata
    trees = checkpointer.load_checkpointables(
      step,
      {
        name: jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
          found[name],
        )
        for name in ('params', 'target', 'opt_state')
      },
    )
  leaves = jax.tree.leaves(trees)
  return losses, b''.join(np.asarray(leaf).tobytes() for leaf in leaves)


def compare(workdir: Path, code: int, expected: Any) -> str:
  """Says how a run differs from one that was left alone; 'equal' if not."""
  if code:
    return explain(workdir, code)
  losses, state = read_result(workdir)
  if losses.keys() != expected[0].keys():
    return 'steps are missing'
  steps = [step for step in losses if losses[step] != expected[0][step]]
  if steps:
    return f'losses differ from step {min(steps)} on'
  return 'equal' if state == expected[1] else 'the state differs'


def explain(workdir: Path, code: int) -> str:
  """Says with which code and which line a run ended."""
  lines = Path(f'{workdir}.log').read_text().splitlines()
  told = [line for line in lines if line.startswith('error: ')]
  return f'exit code {code}: {(told or lines)[-1]:.120}'


def kill(process: subprocess.Popen) -> float:
  """Kills a process; returns seconds until all of its group have ended."""
  process.kill()
  process.wait()
  begin = time.monotonic()
  while members := list_group(process.pid):
    if time.monotonic() - begin > 1.5 * ORPHAN_SECONDS:
      for member in members:
        os.kill(member, 9)
    time.sleep(0.05)
  return time.monotonic() - begin


def list_group(leader: int) -> list[int]:
  """Lists the living processes of a group."""
  members = []
  for path in Path('/proc').glob('[0-9]*/stat'):
    try:
      state, _, group = path.read_text().rpartition(')')[2].split()[:3]
    except OSError:
      continue  # it has just ended
    if int(group) == leader and state != 'Z':
      members.append(int(path.parent.name))
  return members


def measure_peak(process: subprocess.Popen) -> float:
  """Waits for a process; returns the most memory its group had at once, GiB."""
  peak = 0
  while process.poll() is None:
    kib = 0
    for member in list_group(process.pid):
      with contextlib.suppress(OSError):  # it has just ended
        text = Path(f'/proc/{member}/smaps_rollup').read_text()
        kib += sum(map(int, re.findall(r'^Pss: +(\d+)', text, re.M)))
    peak = max(peak, kib)
    time.sleep(0.1)
  return peak / 2**20
