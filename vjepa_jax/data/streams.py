"""Several streams of samples, which go through one pool of readers."""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import grain

from vjepa_jax.data.readers import Journal
from vjepa_jax.errors import UserError


class Stream(NamedTuple):
  """One stream of the batches."""

  loader: Any  # of samples, see `pipeline.SampleLoader`
  weights: Sequence[float]  # share of the samples that each source gives
  batch_size: int  # clips a batch, over all hosts
  position: int = 0  # samples that the run has consumed, over all hosts


@dataclasses.dataclass(frozen=True)
class JointLoader:
  """Loads samples of several streams, whose sources are numbered through."""

  loaders: tuple[Any, ...]
  firsts: tuple[int, ...]  # number of the first source of each
  journal: Journal

  @property
  def max_seconds(self) -> float:
    """See `SampleLoader`."""
    return max(loader.max_seconds for loader in self.loaders)

  @property
  def num_clips(self) -> int:
    """Clips of a sample, at most."""
    return max(loader.num_clips for loader in self.loaders)

  def __call__(self, position: int, key: tuple[int, int]) -> dict[str, Any]:
    """Loads the sample at a position of the stream that the source is of."""
    number = sum(key[0] >= first for first in self.firsts) - 1
    loader = dataclasses.replace(self.loaders[number], journal=self.journal)
    return loader(position, key)


class Order:
  """Which samples a host reads: those of one batch, stream by stream."""

  def __init__(
    self, streams: Sequence[Stream], process_index: int, process_count: int
  ):
    """Counts the samples that the host has in a batch.

    Raises:
      UserError: A batch does not split evenly over the hosts.
    """
    self._streams, self._keys, self._firsts = streams, [], []
    self._process_index, self._process_count = process_index, process_count
    self.counts = []  # samples of each stream
    num_sources = 0
    for stream in streams:
      loader, size = stream.loader, stream.batch_size
      if size % (loader.num_clips * process_count):
        raise UserError(
          f'batch size {size} is not divisible by {process_count} hosts x '
          f'{loader.num_clips} clips a video'
        )
      self.counts.append(size // loader.num_clips // process_count)
      lengths = [len(source) for source in loader.sources]
      self._keys.append(index_sources(lengths, stream.weights, loader.seed))
      self._firsts.append(num_sources)
      num_sources += len(lengths)

  def find(self, number: int) -> tuple[int, tuple[int, int]]:
    """Finds position and key of a sample, by how many the host read before.

    The position is that in the run, over all hosts; row r of batch k is the
    same sample for any number of hosts.
    """
    batch, row = divmod(number, sum(self.counts))
    i = 0
    while row >= self.counts[i]:
      row -= self.counts[i]
      i += 1
    part = batch * self._process_count + self._process_index
    position = self._streams[i].position + part * self.counts[i] + row
    source, item = self._keys[i][position]
    return position, (self._firsts[i] + source, item)


def index_sources(
  lengths: Sequence[int], weights: Sequence[float], seed: int
) -> grain.MapDataset:
  """Makes the endless (source, index), shuffled anew each epoch."""
  parts = [
    grain.MapDataset.range(length)
    .seed((seed + i) % 2**32)
    .shuffle()
    .repeat()
    .map(lambda item, i=i: (i, int(item)))
    for i, length in enumerate(lengths)
  ]
  if len(parts) == 1:
    return parts[0]
  return grain.MapDataset.mix(parts, weights=list(weights))


def join_loaders(streams: Sequence[Stream]) -> Any:
  """Joins the loaders of streams; that of a single one stays as it is."""
  loaders = [stream.loader for stream in streams]
  if len(loaders) == 1:
    return loaders[0]
  counts = [len(loader.sources) for loader in loaders]
  sources = tuple(itertools.chain(*(loader.sources for loader in loaders)))
  options = [x.source_options or (x.options,) * len(x.sources) for x in loaders]
  return JointLoader(
    tuple(
      dataclasses.replace(
        loader, sources=sources, source_options=tuple(itertools.chain(*options))
      )
      for loader in loaders
    ),
    tuple(itertools.accumulate(counts[:-1], initial=0)),
    loaders[0].journal,
  )
