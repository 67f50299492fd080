"""A source of which some videos kill their reader; workers import it."""

import pathlib
import signal

from vjepa_jax.data.records import Record


class Killer(bytes):
  """Ends the process that opens it."""

  signal = signal.SIGSEGV

  def __len__(self) -> int:
    return signal.raise_signal(self.signal)


class Terminated(Killer):
  """Ends the process as who manages the machine might."""

  signal = signal.SIGTERM


class Greedy(Killer):
  """Ends the process as lack of memory does."""

  signal = signal.SIGKILL


class Once(bytes):
  """Ends the first process that opens it, as lack of memory might."""

  marker: pathlib.Path

  def __len__(self) -> int:
    if not self.marker.exists():
      self.marker.touch()
      signal.raise_signal(signal.SIGKILL)
    return super().__len__()


class Endless(bytes):
  """Computes for ever when it is opened."""

  def __len__(self) -> int:
    while True:
      pass


class Killers:
  """A source with some of its videos replaced."""

  def __init__(self, source, replaced) -> None:
    self._source, self._replaced = source, replaced
    self.path = source.path

  def __len__(self) -> int:
    return len(self._source)

  def hash_names(self) -> str:
    return self._source.hash_names()

  def __getitem__(self, index: int) -> Record:
    record = self._source[index]
    return record._replace(video=self._replaced.get(index, record.video))
