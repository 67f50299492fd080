"""Batches on their way from the host to the devices."""

from collections.abc import Mapping
import gc
import json
import time
from typing import Any

from absl import logging
from etils import epath
import grain
import jax
from jax.sharding import NamedSharding

from vjepa_jax.data import storage
from vjepa_jax.parallel.sharding import make_global


class Quarantine:
  """Counts the videos that were replaced and lists each once, with its reason.

  The list in the workdir is continued; each host has a file of its own.
  """

  def __init__(self, workdir: epath.Path):
    process = jax.process_index()
    suffix = f'-{process}' if process else ''
    self._path = workdir / f'quarantine{suffix}.jsonl'
    self._lines = set()
    if self._path.exists():
      # A run that was killed can leave half a line.
      text, _, rest = self._path.read_text().rpartition('\n')
      self._lines = set(text.splitlines())
      if rest:
        storage.replace(self._path, text + '\n' * bool(text))
    self.count = 0  # replacements by this process of this run

  def add(self, failures: list[str]) -> None:
    """Adds the failures of a batch: JSON lists of {name, reason}."""
    new = []
    for failure in failures:
      for event in json.loads(failure):
        self.count += 1
        line = json.dumps(event)
        if line not in self._lines:
          new.append(line + '\n')
          self._lines.add(line)
          logging.warning('replaced %(name)s: %(reason)s', event)
    if new:
      storage.append(self._path, ''.join(new))


class Feed:
  """Iterator of global batches that knows how far it has come."""

  def __init__(
    self,
    dataset: grain.IterDataset,
    sharding: NamedSharding,
    quarantine: Quarantine,
    *,
    progress: Mapping[str, int],
    samples_per_batch: Mapping[str, int],
  ):
    """Starts reading ahead.

    Args:
      dataset: What `make_batches` returned for this position.
      sharding: Sharding of the global batch.
      quarantine: Takes the failures of the batches that are consumed.
      progress: Samples that the run has consumed of each stream, over all
        hosts; a checkpoint saves how far they have come.
      samples_per_batch: By how much a batch advances each.
    """
    self.progress = dict(progress)
    self.wait_seconds = 0.0  # that the last batch was waited for
    self.quarantine = quarantine
    self._samples_per_batch = samples_per_batch

    def transfer(batch: dict[str, Any]):
      failures = [str(failure) for failure in batch.pop('failures')]
      return make_global(batch, sharding), failures

    # Two batches wait on the device, ready before the step asks.
    self._iterator = iter(
      grain.experimental.ThreadPrefetchIterDataset(
        dataset.map(transfer), prefetch_buffer_size=2
      )
    )

  def __next__(self) -> dict[str, Any]:
    """Returns the next batch: streams by name, trees of global jax.Arrays."""
    start = time.perf_counter()
    batch, failures = next(self._iterator)
    self.wait_seconds = time.perf_counter() - start
    for name, count in self._samples_per_batch.items():
      self.progress[name] += count
    self.quarantine.add(failures)
    return batch

  def close(self) -> None:
    """Stops reading ahead; worker processes end."""
    self._iterator.close()
    # Batches that were read ahead lie in shared memory until they are freed.
    self._iterator = None
    gc.collect()
