"""The processes of one run join, and make sure that they fit together."""

from collections import defaultdict
from collections.abc import Callable
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
import secrets
import sys
import threading
from typing import Any, NoReturn

from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.parallel import sharding

_START_SECONDS = 300


def connect(
  coordinator: str,
  num_processes: int | None,
  process_index: int | None,
  heartbeat_seconds: int,
) -> None:
  """Joins the other processes of a run, before anything else uses jax.

  Args:
    coordinator: HOST:PORT of process 0; 'auto' where jax finds this and the
      next two out by itself: TPU pods, SLURM, GKE.
    num_processes, process_index: How many there are, and which one this is.
    heartbeat_seconds: Silence after which the runtime takes a process for lost,
      and ends the others.

  Raises:
    UserError: There is no cluster that jax knows.
  """
  logging.info('waiting %d s for the other processes', _START_SECONDS)
  auto = coordinator == 'auto'
  try:
    jax.distributed.initialize(
      None if auto else coordinator,
      num_processes,
      process_index,
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except ValueError as error:
    found = ' finds no cluster here' if auto else ''
    raise UserError(f'--coordinator={coordinator}{found}: {error}') from error


def leave(code: int, seconds: float) -> NoReturn:
  """Ends this process together with the others, or after `seconds` alone.

  What an ordinary exit does is wait for the others, who may be in a collective
  that waits for this one.
  """

  def shut_down():
    # The runtime may say that others are lost: so be it.
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()

  waiting = threading.Thread(target=shut_down, daemon=True)
  waiting.start()
  waiting.join(seconds)
  # Decoding workers would stay behind.
  for child in multiprocessing.active_children():
    child.terminate()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def check(facts: dict[str, Any], workdir: epath.PathLike) -> None:
  """Checks that the processes of a run fit together, see below.

  Raises:
    UserError: On all processes alike, if they do not.
  """
  # First: processes of unequal numbers of devices cannot gather anything.
  check_devices()
  check_agreement(facts)
  check_shared(workdir)


def check_devices() -> None:
  """Raises UserError unless all processes have as many devices, of one kind."""
  kinds = defaultdict(list)
  for device in jax.devices():
    kinds[device.process_index].append(device.device_kind)
  for process, others in kinds.items():
    if others != kinds[0]:
      raise UserError(
        f'process {process} has {len(others)} devices ({others[0]}), process 0 '
        f'has {len(kinds[0])} ({kinds[0][0]}): all processes need the same'
      )


def check_agreement(facts: dict[str, Any]) -> None:
  """Raises UserError unless processes are about to run the same program.

  Args:
    facts: What must be the same everywhere, JSON. This package's code and
      jax's version are added.
  """
  facts = facts | {'code': _hash_code(), 'jax': jax.__version__}
  everywhere = map(json.loads, gather(json.dumps(facts, default=str)))
  expected, *others = (flatten_dict(found, sep='.') for found in everywhere)
  for process, other in enumerate(others, 1):
    for name in sorted(expected | other):
      if other.get(name) != expected.get(name):
        raise UserError(
          f'process {process} has {name} {other.get(name)}, process 0 has '
          f'{expected.get(name)}: all need the same command, code and data'
        )


def check_shared(workdir: epath.PathLike) -> None:
  """Raises UserError unless the directory is one that all processes see."""
  workdir = epath.Path(workdir)
  path = workdir / f'seen_by_all_hosts_{gather(secrets.token_hex(8))[0]}'
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text('')
  gather('written')
  seen = gather(str(path.exists()))
  if jax.process_index() == 0:
    path.unlink()
  blind = [str(i) for i, answer in enumerate(seen) if answer != 'True']
  if blind:
    raise UserError(
      f'{workdir} of process {", ".join(blind)} is not that of process 0: put '
      '--workdir on storage that all hosts share'
    )


def gather(text: str) -> list[str]:
  """Collects a text from every process, in their order."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]


def gather_rows(row: np.ndarray, mesh: Mesh) -> jax.Array:
  """Starts to collect a row `[n]` from every process of the mesh that is set.

  Returns:
    `[processes, n]` on all devices, before it is there: behind what they are
    running, so that no process waits.
  """
  rows = np.tile(row, (len(mesh.local_devices), 1))
  return _choose_rows(mesh)(
    sharding.make_global(rows, sharding.shard_batch(mesh))
  )


@functools.cache
def _choose_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Makes the function from a row a device to one a process."""
  processes = [device.process_index for device in mesh.devices.flat]
  first = np.unique(processes, return_index=True)[1]
  return jax.jit(lambda x: x[first], out_shardings=sharding.replicate(mesh))


def _hash_code() -> str:
  """Hashes the source files of this package."""
  root = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  return digest.hexdigest()[:12]
