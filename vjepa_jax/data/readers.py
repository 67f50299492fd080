"""Readers that die: which video it was, and how to go on without it.

A file can crash the decoder, fill the memory, or keep the decoder computing for
ever. So each reader notes on disk what it has in hand. What the notes say when
one has died is read again in a process of its own, and what kills that too is
excluded: by name, in a file of the run, so that neither this run nor one that
resumes it touches the video again. It is replaced like any that is damaged, and
all other samples stay the same.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import glob
import hashlib
import json
import multiprocessing
from multiprocessing import connection
import os
import signal
import sys
import tempfile
import threading
import time
from typing import Any

from absl import logging
import cloudpickle
import grain

from vjepa_jax.data import storage
from vjepa_jax.data.video import DecodeError

_STUCK = 70  # exit code of a reader that was in a video for too long
# Ends for which a video can be blamed at once. A process that is killed may
# have been so for what others do to the memory.
_CRASHES = frozenset(
  [_STUCK]
  + [-s for s in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)]
)
# So often a video is tried.
MAX_TRIES = 3
_SECONDS_BETWEEN_LOOKS = 1.0
# How many readers may die in so many samples, of no video that kills one alone.
_MAX_UNEXPLAINED, _SAMPLES = 3, 10_000

# Of this process: the notes of each thread, by folder, and where threads that
# are in a video began, in seconds of computing.
_notes = threading.local()
_began: dict[int, float] = {}


def start_reader(max_seconds: float) -> None:
  """Prepares a process that only reads.

  It ends with its parent, even if that is killed, and if it computes for longer
  than it may in one video. When memory runs out the system kills it first.

  Args:
    max_seconds: Of computing in one video.
  """
  with contextlib.suppress(OSError), open('/proc/self/oom_score_adj', 'w') as f:
    f.write('1000')

  def watch():
    parent = multiprocessing.parent_process().sentinel
    while not connection.wait([parent], _SECONDS_BETWEEN_LOOKS):
      for thread, began in list(_began.items()):
        if _read_clock(thread, began) - began > max_seconds:
          os._exit(_STUCK)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _read_clock(thread: int, default: float) -> float:
  """Seconds that a thread of this process has computed, where one can know."""
  if not hasattr(time, 'pthread_getcpuclockid'):
    return default
  return time.clock_gettime(time.pthread_getcpuclockid(thread))


@dataclasses.dataclass(frozen=True)
class Journal:
  """What the readers of a host have in hand, and what they must not touch.

  Attributes:
    folder: Of the notes, on a local disk; without one none are made.
    exclude_file: Where names are added.
    excluded: Names of videos, `SOURCE: NAME`; a name alone is of any source.
  """

  folder: str = ''
  exclude_file: str = ''
  excluded: frozenset[str] = frozenset()

  @contextlib.contextmanager
  def reading(
    self, name: str, source: str, position: int, key: tuple[int, int]
  ) -> Iterator[None]:
    """Notes a video while it is read.

    Args:
      name: Of the video.
      source: Its path; in another there may be a video of the same name.
      position: Of the sample in the run.
      key: Source and index of the sample.

    Raises:
      DecodeError: The video is excluded.
    """
    full_name = f'{source}: {name}'
    if self.excluded & {full_name, name}:
      raise DecodeError('excluded, it killed its reader', name)
    if not self.folder:
      yield
      return
    thread = threading.get_ident()
    self._note(json.dumps([int(position), [int(k) for k in key], full_name]))
    _began[thread] = time.thread_time()
    try:
      yield
    finally:
      del _began[thread]
      self._note('')

  def _note(self, text: str) -> None:
    """Replaces the note of this thread."""
    files = _notes.__dict__
    if self.folder not in files:
      os.makedirs(self.folder, exist_ok=True)
      name = f'{os.getpid()}-{threading.get_ident()}'
      path = os.path.join(self.folder, name)
      # Open as long as the thread lives.
      files[self.folder] = open(path, 'wb', buffering=0)  # noqa: SIM115
    files[self.folder].seek(0)
    files[self.folder].write(f'{text}\n'.encode())

  def take(self) -> list[tuple[int, tuple[int, int], str]]:
    """Returns what readers that are gone had in hand, and forgets it."""
    notes = []
    if not self.folder:
      return notes
    for path in glob.glob(os.path.join(glob.escape(self.folder), '*-*')):
      with open(path, 'rb') as file:
        line = file.readline()
      os.remove(path)
      with contextlib.suppress(ValueError):
        position, key, name = json.loads(line)
        notes.append((position, tuple(key), name))
    with contextlib.suppress(OSError):
      os.rmdir(self.folder)
    return sorted(notes)

  def exclude(self, reasons: dict[str, str]) -> 'Journal':
    """Excludes videos, says why, and returns the journal that does so."""
    for name, reason in reasons.items():
      logging.warning(
        'excluded %s from now on, see %s: it killed its reader, %s',
        name,
        self.exclude_file,
        reason,
      )
    lines = ''.join(f'{name}\n' for name in reasons)
    if reasons and self.exclude_file:
      if storage.exists(self.exclude_file):
        lines = storage.read(self.exclude_file).decode() + lines
      storage.replace(self.exclude_file, lines)
    excluded = self.excluded | reasons.keys()
    return dataclasses.replace(self, excluded=excluded)


def open_journal(workdir: str, index: int, reader: str = '') -> Journal:
  """Opens the journal of a host.

  Args:
    workdir: Of the run; remote or local.
    index: Of the host, which adds to a file of its own and obeys all.
    reader: Name of who reads, where others of this host read something else.
  """
  folder = os.path.join(workdir, f'reading-{reader}{index}')
  if storage.is_remote(workdir):
    run = hashlib.sha256(folder.encode()).hexdigest()[:16]
    folder = os.path.join(tempfile.gettempdir(), f'vjepa_jax-reading-{run}')
  excluded = set()
  for path in storage.match(f'{glob.escape(workdir)}/exclude*.txt'):
    excluded.update(storage.read(path).decode().splitlines())
  suffix = f'-{index}' if index else ''
  return Journal(
    folder,
    os.path.join(workdir, f'exclude{suffix}.txt'),
    frozenset(excluded - {''}),
  )


def find_killers(
  loader: Any, notes: Sequence[tuple[int, tuple[int, int], str]]
) -> dict[str, str]:
  """Reads samples again, in another process, and sees which kill it.

  Args:
    loader: Loads a sample by position and key; has a `journal`.
    notes: What `Journal.take` returned.

  Returns:
    From the names of the videos to how their reader ended.
  """
  reasons = {}
  notes = list(notes)
  ends = []  # of the processes that died of the first note
  folder = f'{loader.journal.folder}-trial'
  while notes:
    excluded = loader.journal.excluded | reasons.keys()
    trial = Journal(folder, excluded=excluded)
    process = multiprocessing.get_context('spawn').Process(
      target=_try_all,
      args=(cloudpickle.dumps(_replace_journal(loader, trial)), notes),
    )
    process.start()
    process.join()
    left = trial.take()
    if not process.exitcode or not left:
      break
    *sample, name = left[0]
    before = [list(note[:2]) for note in notes].index(sample)
    notes = notes[before:]
    ends = [*(ends if not before else []), process.exitcode]
    if is_to_blame(ends):
      reasons[name] = describe_end(process.exitcode)
    if is_to_blame(ends) or len(ends) == MAX_TRIES:
      del notes[0]
      ends = []
  return reasons


def exclude_killers(loader: Any) -> Any:
  """Returns the loader without what killed readers of its journal."""
  journal = loader.journal
  reasons = find_killers(loader, journal.take())
  return (
    _replace_journal(loader, journal.exclude(reasons)) if reasons else loader
  )


def is_to_blame(ends: Sequence[int]) -> bool:
  """Says whether a video is why processes end.

  Args:
    ends: Exit codes of those that died of it; all but the first had begun with
      it.
  """
  return ends[-1] in _CRASHES or ends.count(-signal.SIGKILL) == MAX_TRIES


def _try_all(pickled: bytes, notes: Sequence[Any]) -> None:
  """Loads samples; that something raises is for the run to meet."""
  loader = cloudpickle.loads(pickled)
  start_reader(loader.max_seconds)
  for position, key, _ in notes:
    with contextlib.suppress(Exception):
      loader(position, key)


def describe_end(exit_code: int) -> str:
  """Says how a process ended."""
  if exit_code < 0:
    return signal.Signals(-exit_code).name
  if exit_code == _STUCK:
    return 'which did not come back'
  return f'exit code {exit_code}'


def _replace_journal(loader: Any, journal: Journal) -> Any:
  return dataclasses.replace(loader, journal=journal)


class LastingSamples(grain.IterDataset):
  """Samples whose readers are started again without what killed one of them."""

  def __init__(
    self, loader: Any, read: Callable[[Any, int], grain.IterDataset]
  ) -> None:
    """Starts nothing yet.

    Args:
      loader: Loads a sample; has a `journal`.
      read: From a loader and the number of a sample to all from that one on.
    """
    super().__init__()
    self._loader = loader
    self._read = read

  def __iter__(self) -> grain.DatasetIterator:
    return _LastingIterator(self._loader, self._read)


class _LastingIterator(grain.DatasetIterator):
  """See `LastingSamples`."""

  def __init__(
    self, loader: Any, read: Callable[[Any, int], grain.IterDataset]
  ) -> None:
    super().__init__()
    self._loader = loader
    self._read = read
    self._number = 0
    self._unexplained = []  # how far it had come each time
    self._exclude_killers()  # of an earlier run
    self._samples = iter(read(self._loader, 0))

  def __next__(self) -> Any:
    while True:
      try:
        sample = next(self._samples)
      except RuntimeError as error:
        # Of Grain, which has no type for it.
        if 'Worker process was terminated' not in str(error):
          raise
        logging.warning('a reader died: what it had in hand is tried again')
        self._samples.close()
        if not self._exclude_killers():
          self._unexplained.append(self._number)
        recent = [n for n in self._unexplained if n > self._number - _SAMPLES]
        if len(recent) > _MAX_UNEXPLAINED:
          raise RuntimeError(
            f'readers died {len(recent)} times, of no video alone: is there '
            'memory for so many of them?'
          ) from error
        self._samples = iter(self._read(self._loader, self._number))
      else:
        self._number += 1
        return sample

  def _exclude_killers(self) -> bool:
    """Excludes what killed its reader; returns whether there was something."""
    before, self._loader = self._loader, exclude_killers(self._loader)
    return self._loader is not before

  def close(self) -> None:
    if self._closed:
      return
    super().close()
    self._samples.close()
    # Readers are stopped in the middle. At the end of the program, nothing can
    # be imported any more.
    if not sys.is_finalizing():
      self._loader.journal.take()

  def get_state(self) -> dict[str, int]:
    return {'number': self._number}

  def set_state(self, state: dict[str, int]) -> None:
    self._number = state['number']
    self._samples.close()
    self._samples = iter(self._read(self._loader, self._number))
