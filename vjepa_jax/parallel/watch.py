"""The processes of one run watch each other, and end together.

When one of them dies, the others wait for it in a collective. The runtime
notices after tens of seconds, and then aborts with a stack trace. So each
process keeps a connection to process 0: the system closes it as soon as a
process dies, and on a host that lost its power it falls silent.
"""

from collections.abc import Callable
import contextlib
import json
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

from absl import logging
import jax

from vjepa_jax import mistakes

# Exit code of who has lost another process (EX_UNAVAILABLE).
LOST = 69
# The runtime's own limit comes last, for it ends in a stack trace.
HEARTBEAT_SECONDS = 60

_SILENCE_SECONDS = 40.0
_PING_SECONDS = 5.0
_CONNECT_SECONDS = 30.0
_GRACE_SECONDS = 2.0


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
    self._selector = selectors.DefaultSelector()
    for process, connection in peers.items():
      self._selector.register(connection, selectors.EVENT_READ, process)
    threading.Thread(target=self._run, name='watch', daemon=True).start()

  def close(self) -> None:
    """Says goodbye: from now on this process may end."""
    with self._lock:
      self._send('bye')
      self._peers = {}

  def fail(self, error: BaseException) -> None:
    """Explains an error, and ends this process and all others.

    The others end with the same words if it is a mistake, which all of them
    would make, else as `LOST`.
    """
    # A collective fails where a process is gone: let the watch say so first.
    time.sleep(_GRACE_SECONDS)
    with self._lock:
      code = mistakes.explain(error)
      process = self._describe(jax.process_index())
      self._end(code, f'{process}: {type(error).__name__}: {error}')

  def _run(self) -> None:
    pinged = time.monotonic()
    heard = dict.fromkeys(self._peers, pinged)
    while True:
      ready = self._selector.select(_PING_SECONDS)
      with self._lock:
        now = time.monotonic()
        for key, _ in ready:
          heard[key.data] = now
          if key.data in self._peers and not self._receive(key.data):
            self._selector.unregister(key.fileobj)
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
    logging.error('%s%s', reason, '' if code == mistakes.EXIT_CODE else resumes)
    self._end(code, reason)

  def _end(self, code: int, reason: str) -> None:
    reason = ' '.join(reason.split())
    others = code if code == mistakes.EXIT_CODE else LOST
    self._send(f'end {others} {reason}')
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


def connect(
  coordinator: str | None, gather: Callable[[str], list[str]]
) -> Watch:
  """Connects every process with process 0; all of them call this.

  Args:
    coordinator: HOST:PORT of process 0, if it was given.
    gather: Collects a text from every process.
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
  offers = [json.loads(text) for text in gather(json.dumps(offer))]
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
    HEARTBEAT_SECONDS,
  )
