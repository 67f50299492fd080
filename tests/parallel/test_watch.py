"""The watch of processes over each other, without processes."""

import logging
import os
from queue import Queue
import socket
import sys
import threading

import pytest

from vjepa_jax import mistakes
from vjepa_jax.parallel import watch as watch_lib

# The fake exit ends the watching thread by an exception.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)


@pytest.fixture
def connect(monkeypatch):
  """Gives a watch of process 0 over others, their ends, and its exit code."""
  exits, ends, watches = Queue(), [], []

  def leave(code):
    exits.put(code)
    sys.exit(code)  # ends the watching thread alone

  monkeypatch.setattr(os, '_exit', leave)
  monkeypatch.setattr(watch_lib.multiprocessing, 'active_children', lambda: [])
  monkeypatch.setattr(watch_lib, '_PING_SECONDS', 0.05)

  def connect(num_processes):
    pairs = [socket.socketpair() for _ in range(num_processes - 1)]
    ends.extend(end for pair in pairs for end in pair)
    peers = {i: pair[0] for i, pair in enumerate(pairs, 1)}
    for pair in pairs:
      pair[1].settimeout(5)
    names = [f'host{i}' for i in range(num_processes)]
    watches.append(watch_lib.Watch(peers, names))
    return watches[-1], [pair[1] for pair in pairs], exits

  yield connect
  # None may be left that would really end this process.
  for watch in watches:
    watch.close()
  for thread in threading.enumerate():
    if thread.name == 'watch':
      thread.join(timeout=5)
      assert not thread.is_alive()
  for end in ends:
    end.close()


def _receive(end):
  """Reads until something else than a ping comes."""
  text = ''
  while not (lines := [x for x in text.splitlines() if x != 'ping']):
    text += end.recv(1024).decode()
  return lines[0]


def test_a_lost_process_is_told_to_all(connect, caplog):
  _, others, exits = connect(3)
  with caplog.at_level(logging.ERROR):
    others[0].close()
    assert exits.get(timeout=5) == watch_lib.LOST
  assert 'process 1 on host1 is gone; the same command' in caplog.text
  assert _receive(others[1]) == 'end 69 process 1 on host1 is gone'


def test_a_silent_process_is_lost(connect, caplog, monkeypatch):
  monkeypatch.setattr(watch_lib, '_SILENCE_SECONDS', 0.5)
  _, _, exits = connect(2)
  assert exits.get(timeout=5) == watch_lib.LOST
  assert 'process 1 on host1 has not answered for 0 s' in caplog.text


def test_a_mistake_of_one_ends_all_with_its_message(connect, caplog):
  _, others, exits = connect(3)
  others[0].sendall(b'ping\nend 2 process 1 on host1: ValueError: no data\n')
  assert exits.get(timeout=5) == mistakes.EXIT_CODE
  assert 'process 1 on host1: ValueError: no data' in caplog.text
  assert 'resumes' not in caplog.text
  assert _receive(others[1]).endswith('host1: ValueError: no data')


def test_who_says_goodbye_may_leave(connect, caplog):
  watch, others, exits = connect(3)
  others[0].sendall(b'bye\n')
  others[0].close()
  watch.close()
  assert _receive(others[1]) == 'bye'
  others[1].close()
  assert exits.empty() and 'gone' not in caplog.text


@pytest.mark.parametrize(
  'error,code,told',
  [
    (FloatingPointError('loss\nnot finite'), 1, watch_lib.LOST),
    (ValueError('batch size'), mistakes.EXIT_CODE, mistakes.EXIT_CODE),
  ],
)
def test_own_failure_ends_the_others(
  connect, monkeypatch, capsys, error, code, told
):
  monkeypatch.setattr(watch_lib, '_GRACE_SECONDS', 0.0)
  watch, others, exits = connect(2)
  with pytest.raises(SystemExit):
    watch.fail(error)
  assert exits.get() == code
  reason = ' '.join(str(error).split())
  expected = f'end {told} process 0 on host0: {type(error).__name__}: {reason}'
  assert _receive(others[0]) == expected
  assert str(error) in capsys.readouterr().err
