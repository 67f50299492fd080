"""The processes of one run: they start alike, and end together.

When one of several processes dies, the others wait for it in a collective. The
runtime notices after tens of seconds, and then aborts with a stack trace. So
each process keeps a connection to process 0: the system closes it as soon as a
process dies, and on a host that lost its power it falls silent.
"""

from collections import Counter
import contextlib
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

# Exit codes: the user's mistake; another process was lost (EX_UNAVAILABLE).
MISTAKE = 2
LOST = 69

# The runtime's own limit comes last, for it ends in a stack trace.
_HEARTBEAT_SECONDS = 60
_START_SECONDS = 300
_SILENCE_SECONDS = 40.0
_PING_SECONDS = 5.0
_CONNECT_SECONDS = 30.0


class Watch:
  """Connections between process 0 and the others, so that all end together."""

  def __init__(self, peers: dict[int, socket.socket], names: list[str]):
    """Starts to watch.

    Args:
      peers: Connections by process index: all others on process 0, else only
        process 0. Those that are missing are left to the runtime.
      names: Host names of all processes.
    """
    self._peers = peers
    self._names = names
    self._lock = threading.Lock()
    threading.Thread(target=self._run, daemon=True).start()

  def close(self) -> None:
    """Says goodbye: from now on this process may end."""
    with self._lock:
      self._send('bye')
      self._peers = {}

  def fail(self, code: int, reason: str) -> None:
    """Ends this process and all others at once.

    Args:
      code: Exit code. The others take over `MISTAKE`, else they end as `LOST`.
      reason: What the others say.
    """
    with self._lock:
      self._end(code, f'{self._describe(jax.process_index())}: {reason}')

  def _run(self) -> None:
    selector = selectors.DefaultSelector()
    pinged = time.monotonic()
    heard = dict.fromkeys(self._peers, pinged)
    for process, connection in self._peers.items():
      selector.register(connection, selectors.EVENT_READ, process)
    while True:
      ready = selector.select(_PING_SECONDS)
      with self._lock:
        now = time.monotonic()
        for key, _ in ready:
          heard[key.data] = now
          if key.data in self._peers and not self._receive(key.data):
            selector.unregister(key.fileobj)
            del self._peers[key.data]
        if not self._peers:
          return
        for process in self._peers:
          if now - heard[process] > _SILENCE_SECONDS:
            self._lose(
              f'{self._describe(process)} has not answered for '
              f'{_SILENCE_SECONDS:.0f} s'
            )
        if now - pinged > _PING_SECONDS:
          pinged = now
          self._send('ping')

  def _receive(self, process: int) -> bool:
    """Reads what a process sent; False if it said goodbye."""
    data = b''
    # A reset connection means what a closed one does.
    with contextlib.suppress(OSError):
      data = self._peers[process].recv(2**16)
    if not data:
      self._lose(f'{self._describe(process)} is gone')
    for line in data.decode(errors='replace').splitlines():
      word, _, rest = line.partition(' ')
      if word == 'end':
        code, _, reason = rest.partition(' ')
        self._lose(reason, int(code))
      if word == 'bye':
        return False
    return True

  def _lose(self, reason: str, code: int = LOST) -> None:
    resumes = '; the same command resumes from the last checkpoint'
    logging.error('%s%s', reason, '' if code == MISTAKE else resumes)
    self._end(code, reason)

  def _end(self, code: int, reason: str) -> None:
    reason = ' '.join(reason.split())
    self._send(f'end {code if code == MISTAKE else LOST} {reason}')
    # Decoding workers would stay behind; an ordinary exit would wait for the
    # processes that are gone.
    for child in multiprocessing.active_children():
      child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _send(self, line: str) -> None:
    for connection in self._peers.values():
      with contextlib.suppress(OSError):
        connection.sendall(f'{line}\n'.encode())

  def _describe(self, process: int) -> str:
    return f'process {process} on {self._names[process]}'


def start(
  coordinator: str | None,
  num_processes: int | None,
  process_index: int | None,
  facts: dict[str, Any],
  workdir: epath.PathLike,
) -> Watch:
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
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except ValueError as error:
    found = '' if coordinator else ' finds no cluster here'
    raise ValueError(
      f'--coordinator={coordinator or "auto"}{found}: {error}'
    ) from error
  check_devices()
  check_agreement(facts)
  check_shared(workdir)
  return watch(coordinator)


def check_devices() -> None:
  """Checks that all processes have as many devices, of one kind.

  Raises:
    ValueError: The first that differs is named.
  """
  counts = Counter((d.process_index, d.device_kind) for d in jax.devices())
  (_, kind), count = next(iter(counts.items()))
  for (process, other_kind), other_count in counts.items():
    if (other_kind, other_count) != (kind, count):
      raise ValueError(
        f'process {process} has {other_count} devices ({other_kind}), process '
        f'0 has {count} ({kind}): all processes need the same'
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


def watch(coordinator: str | None) -> Watch:
  """Connects every process with process 0; all of them call this.

  Args:
    coordinator: HOST:PORT of process 0, if it was given.
  """
  first = jax.process_index() == 0
  offer = {'name': socket.gethostname()}
  if first:
    server = socket.create_server(('', 0), backlog=jax.process_count())
    offer |= {
      'addresses': _list_addresses(coordinator),
      'port': server.getsockname()[1],
      'token': secrets.token_hex(16),
    }
  offers = [json.loads(text) for text in _gather(json.dumps(offer))]
  if first:
    with server:
      peers = _accept(server, offer['token'])
  else:
    peers = _call(offers[0])
  return Watch(peers, [o['name'] for o in offers])


def _list_addresses(coordinator: str | None) -> list[str]:
  """Lists names and addresses by which other hosts may reach this one."""
  addresses = [coordinator.rpartition(':')[0]] if coordinator else []
  with (
    contextlib.suppress(OSError),
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
  ):
    # Nothing is sent: it only asks which interface leads out of this host.
    probe.connect(('10.255.255.255', 1))
    addresses.append(probe.getsockname()[0])
  return [*addresses, socket.getfqdn()]


def _accept(server: socket.socket, token: str) -> dict[int, socket.socket]:
  """Accepts the calls of the other processes."""
  peers = {}
  deadline = time.monotonic() + _CONNECT_SECONDS
  while len(peers) < jax.process_count() - 1:
    # Timeouts, and scanners that hang up, are errors of the same kind.
    with contextlib.suppress(OSError, ValueError):
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      connection, _ = server.accept()
      connection.settimeout(_PING_SECONDS)
      said, _, process = connection.recv(256).decode().partition(' ')
      if secrets.compare_digest(said, token):
        peers[int(process)] = connection
    if time.monotonic() > deadline:
      break
  for process in range(1, jax.process_count()):
    if process not in peers:
      _warn_unwatched(process)
  return peers


def _call(offer: dict[str, Any]) -> dict[int, socket.socket]:
  """Calls process 0."""
  for address in offer['addresses']:
    with contextlib.suppress(OSError):
      connection = socket.create_connection(
        (address, offer['port']), timeout=_PING_SECONDS
      )
      connection.sendall(f'{offer["token"]} {jax.process_index()}'.encode())
      return {0: connection}
  _warn_unwatched(0)
  return {}


def _warn_unwatched(process: int) -> None:
  logging.warning(
    'no connection with process %d: if it dies, this one notices after %d s',
    process,
    _HEARTBEAT_SECONDS,
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
