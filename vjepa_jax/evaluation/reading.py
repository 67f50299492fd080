"""Reads the videos of an evaluation, past those that kill who reads them."""

from collections.abc import Iterator
import contextlib
import dataclasses

import numpy as np

from vjepa_jax.data import readers, sources
from vjepa_jax.data.clip import ClipOptions, read_timed_clips
from vjepa_jax.data.records import Record


@dataclasses.dataclass(frozen=True)
class Reader:
  """Cuts the clips of videos, in threads of this process; see `open_reader`."""

  source: sources.Source
  options: ClipOptions
  journal: readers.Journal = readers.Journal()

  @property
  def max_seconds(self) -> float:
    """Seconds of computing for a video, beyond which its reader is stuck."""
    return 5 * self.options.num_clips * self.options.max_seconds

  def __call__(self, position: int, key: tuple[int, int]) -> None:
    """Reads a video by its index, the second of the key, for a trial."""
    self.cut(self.source[key[1]], position)

  def cut(self, record: Record, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the clips of a record of the source, see `read_timed_clips`."""
    path = self.source.path
    with self.journal.reading(record.name, path, index, (0, index)):
      return read_timed_clips(record, self.options)


@contextlib.contextmanager
def open_reader(
  source: sources.Source, options: ClipOptions, journal: readers.Journal
) -> Iterator[Reader]:
  """Opens a reader that leaves out what killed an earlier one of the journal.

  A video that kills this process is noted; who runs the same command again goes
  on without it, and reads in one line which it was.
  """
  reader = readers.exclude_killers(Reader(source, options, journal))
  try:
    yield reader
  finally:
    reader.journal.take()
