"""The processes of one run join, and make sure that they fit together."""

from collections import Counter
import hashlib
import json
from pathlib import Path
import secrets
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from vjepa_jax.parallel import watch

_START_SECONDS = 300


def start(
  coordinator: str | None,
  num_processes: int | None,
  process_index: int | None,
  facts: dict[str, Any],
  workdir: epath.PathLike,
) -> watch.Watch:
  """Joins the other processes of a run, before anything else uses jax.

  Args:
    coordinator: HOST:PORT of process 0; None where jax finds all three out by
      itself: TPU pods, SLURM, GKE.
    num_processes: Number of processes.
    process_index: Which one this is.
    facts: What must be the same in all of them, JSON.
    workdir: Directory that must be the same for all of them.

  Returns:
    What ends this process when another one dies.

  Raises:
    ValueError: On all processes alike, if they do not fit together.
  """
  logging.info('waiting %d s for the other processes', _START_SECONDS)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_index,
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=watch.HEARTBEAT_SECONDS,
    )
  except ValueError as error:
    found = '' if coordinator else ' finds no cluster here'
    raise ValueError(
      f'--coordinator={coordinator or "auto"}{found}: {error}'
    ) from error
  check_devices()
  check_agreement(facts)
  check_shared(workdir)
  return watch.connect(coordinator, _gather)


def check_devices() -> None:
  """Checks that all processes have as many devices, of one kind.

  Raises:
    ValueError: The first that differs is named.
  """
  counts = Counter((d.process_index, d.device_kind) for d in jax.devices())
  (first, kind), count = next(iter(counts.items()))
  for (process, other_kind), other_count in counts.items():
    if (other_kind, other_count) != (kind, count):
      raise ValueError(
        f'process {process} has {other_count} devices ({other_kind}), process '
        f'{first} has {count} ({kind}): all processes need the same'
      )


def check_agreement(facts: dict[str, Any]) -> None:
  """Checks that all processes are about to run the same program.

  Args:
    facts: What must be the same everywhere, JSON. This package's code and
      jax's version are added.

  Raises:
    ValueError: The first difference is named.
  """
  facts = facts | {'code': _hash_code(), 'jax': jax.__version__}
  everywhere = _gather(json.dumps(facts, default=str))
  expected, *others = (_flatten(json.loads(text)) for text in everywhere)
  for process, other in enumerate(others, 1):
    for name in sorted(expected | other):
      if other.get(name) != expected.get(name):
        raise ValueError(
          f'process {process} has {name} {other.get(name)}, process 0 has '
          f'{expected.get(name)}: start all with the same command and code'
        )


def check_shared(workdir: epath.PathLike) -> None:
  """Checks that the directory is one that all processes see.

  Raises:
    ValueError: The processes that do not see it are named.
  """
  workdir = epath.Path(workdir)
  path = workdir / f'seen_by_all_hosts_{_gather(secrets.token_hex(8))[0]}'
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text('')
  _gather('written')
  seen = _gather(str(path.exists()))
  if jax.process_index() == 0:
    path.unlink()
  blind = [str(i) for i, answer in enumerate(seen) if answer != 'True']
  if blind:
    raise ValueError(
      f'{workdir} of process {", ".join(blind)} is not that of process 0: put '
      '--workdir on storage that all hosts share'
    )


def _gather(text: str) -> list[str]:
  """Collects a text from every process, in their order."""
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]


def _hash_code() -> str:
  """Hashes the source files of this package."""
  root = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  return digest.hexdigest()[:12]


def _flatten(tree: Any, name: str = '') -> dict[str, str]:
  """Flattens JSON to texts by dotted names: {'config.fsdp': '8', ...}."""
  if not isinstance(tree, dict):
    return {name: json.dumps(tree)}
  flat = {}
  for key, value in tree.items():
    flat |= _flatten(value, f'{name}.{key}' if name else key)
  return flat
