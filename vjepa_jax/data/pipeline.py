"""From sources of videos to batches of clips and masks, by Grain.

Everything random about a sample is a pure function of (seed, position of the
sample in the run). Batch k holds the same samples in the same order for any
number of hosts, workers and threads, so that its position is all that a
checkpoint needs to resume on the very next batch.

Workers read single samples, which the parent joins: so what waits in memory is
counted in clips, and all workers work on the batch that is wanted next.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import math
import sys
from typing import Any

from absl import flags, logging
import grain
import numpy as np

from vjepa_jax.data.clip import ClipOptions, read_clips
from vjepa_jax.data.features import FeatureSource, join_segments
from vjepa_jax.data.readers import Journal, LastingSamples, start_reader
from vjepa_jax.data.records import check_label
from vjepa_jax.data.sources import Source, find_usable
from vjepa_jax.data.streams import Order, Stream, join_loaders
from vjepa_jax.data.video import DecodeError
from vjepa_jax.errors import UserError

MaskSampler = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]

# Videos that may fail in a row before the fault is not theirs.
_MAX_ATTEMPTS = 100
_MASK_STREAM = 2**31
# Samples of a worker beside those that its threads read: one that goes to the
# parent, one that comes from there, and the two queues between hold one each.
_IN_TRANSIT = 4
# Arrays of fewer bytes, masks and labels, are sent; others are shared, which
# takes a file descriptor each.
_MIN_SHARED_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class SampleLoader:
  """Loads one sample: clips of a video that can be read, and their masks."""

  sources: tuple[Source, ...]
  options: ClipOptions
  mask_samplers: tuple[MaskSampler, ...]  # one a mask spec
  seed: int  # of the run
  num_classes: int | None = None  # None leaves labels out
  source_options: tuple[ClipOptions, ...] = ()  # where they differ
  name: str = 'video'  # of the stream
  journal: Journal = Journal()

  @property
  def max_seconds(self) -> float:
    """Seconds of computing for a sample, beyond which its reader is stuck."""
    return 5 * self.options.num_clips * self.options.max_seconds

  @property
  def num_clips(self) -> int:
    """Clips of a sample."""
    return self.options.num_clips

  @property
  def clip_bytes(self) -> int:
    """Size of a clip."""
    return 3 * self.options.frames * self.options.resolution**2

  def __call__(self, position: int, key: tuple[int, int]) -> dict[str, Any]:
    """Loads the sample at a position of the run.

    Args:
      position: Position in the run, counted over all hosts.
      key: Source and index in it. If that video fails, others of the same
        source are drawn, deterministically.

    Returns:
      The stream: 'pixels' uint8 `[num_clips, frames, size, size, 3]`,
      'masks', a tuple with 'context' int32 `[num_clips, Kc]` and 'target'
      `[num_clips, Kt]` a spec, with `num_classes` a 'label' int32
      `[num_clips]`; and 'failures', {name, reason} of each video that failed.

    Raises:
      RuntimeError: 100 videos in a row failed.
      UserError: A video has no label, or one outside of the classes.
    """
    options = self.options
    if self.source_options:
      options = self.source_options[key[0]]
    record, clips, failures = read_usable(
      self, position, key, lambda record, rng: read_clips(record, options, rng)
    )
    stream = {
      'pixels': clips,
      'masks': tuple(
        self._draw_masks(position, i, len(clips))
        for i in range(len(self.mask_samplers))
      ),
    }
    if self.num_classes is not None:
      check_label(record, self.num_classes)
      stream['label'] = np.full(len(clips), record.label, np.int32)
    return {self.name: stream, 'failures': failures}

  def _draw_masks(
    self, position: int, spec: int, num_clips: int
  ) -> dict[str, np.ndarray]:
    """Draws the masks of one spec, each clip its own."""
    seeds = (self.seed, position)
    drawn = [
      self.mask_samplers[spec](
        np.random.default_rng((*seeds, _MASK_STREAM + clip, spec))
      )
      for clip in range(num_clips)
    ]
    context, target = map(np.stack, zip(*drawn, strict=True))
    return {'context': context, 'target': target}


@dataclasses.dataclass(frozen=True)
class FeatureLoader:
  """Loads one sample of labelled features, as `SampleLoader` loads clips."""

  sources: tuple[FeatureSource, ...]
  seed: int  # of the order of the samples
  num_classes: int
  journal: Journal = Journal()

  num_clips = 1
  max_seconds = math.inf

  @property
  def clip_bytes(self) -> int:
    """Size of the features of one video."""
    return join_segments(find_usable(self.sources[0]).features).nbytes

  def __call__(self, position: int, key: tuple[int, int]) -> dict[str, Any]:
    """Loads 'features' float32 `[1, tokens, D]` and their 'label'."""
    video, features, failures = read_usable(
      self, position, key, lambda video, _: join_segments(video.features)
    )
    check_label(video, self.num_classes)
    label = np.array([video.label], np.int32)
    return {
      'video': {'features': features, 'label': label},
      'failures': failures,
    }


def read_usable(
  loader: SampleLoader | FeatureLoader,
  position: int,
  key: tuple[int, int],
  read: Callable[[Any, np.random.Generator], np.ndarray],
) -> tuple[Any, np.ndarray, list[dict[str, str]]]:
  """Reads an item of a source, or another one if it is damaged.

  Args:
    loader: Of the sample.
    position: Of the sample.
    key: Source and index of the first that is tried; others are drawn.
    read: From a record to what is wanted of it.

  Returns:
    The record, what was read of it, and name and reason of each that failed.
  """
  source, item = loader.sources[key[0]], key[1]
  # Of those whose records have to be parsed.
  find_name = getattr(source, 'name', 'record {}'.format)
  failures = []
  for attempt in range(_MAX_ATTEMPTS):
    rng = np.random.default_rng((loader.seed, position, attempt))
    if attempt:
      item = int(rng.integers(len(source)))
    try:
      name = find_name(item)
      with loader.journal.reading(name, source.path, position, key):
        record = source[item]
      with loader.journal.reading(record.name, source.path, position, key):
        return record, read(record, rng), failures
    except DecodeError as error:
      name = error.name or record.name
      failures.append({'name': name, 'reason': str(error)})
  raise RuntimeError(
    f'{_MAX_ATTEMPTS} videos in a row could not be read, the last one '
    f'{failures[-1]["name"]}: {failures[-1]["reason"]}'
  )


class _Batches(grain.IterDataset):
  """Joins samples `[num_clips, ...]` to batches `[B, ...]`."""

  def __init__(self, samples: grain.IterDataset, counts: Sequence[int]):
    """Takes the samples of a batch, and how many of each stream they are."""
    super().__init__(samples)
    self._counts = counts

  def __iter__(self) -> grain.DatasetIterator:
    return _BatchIterator(iter(self._parent), self._counts)


class _BatchIterator(grain.DatasetIterator):
  """Copies each sample to its place as it comes, so that none wait."""

  def __init__(self, samples: grain.DatasetIterator, counts: Sequence[int]):
    super().__init__(samples)
    self._counts = counts

  def __next__(self) -> dict[str, Any]:
    batch, failures = {}, []
    for count in self._counts:
      batch |= self._join(count, failures)
    return batch | {'failures': np.array(failures, np.str_)}

  def _join(self, count: int, failures: list[str]) -> dict[str, Any]:
    """Joins the next samples, of one stream; adds what failed."""
    batch = None
    for row in range(count):
      sample = dict(next(self._parent))
      failed = sample.pop('failures')
      if failed:
        failures.append(json.dumps(failed))
      if batch is None:
        batch = _map_arrays(
          lambda x: np.empty((count * len(x), *x.shape[1:]), x.dtype), sample
        )

      def copy(whole, part, row=row):
        whole[row * len(part) : (row + 1) * len(part)] = part

      _map_arrays(copy, batch, sample)
    return batch

  def get_state(self) -> Any:
    return self._parent.get_state()

  def set_state(self, state: Any) -> None:
    self._parent.set_state(state)


def _map_arrays(function: Callable[..., Any], *trees: Any) -> Any:
  """Calls a function with the arrays at the same place of several trees."""
  first = trees[0]
  if isinstance(first, Mapping):
    return {k: _map_arrays(function, *(t[k] for t in trees)) for k in first}
  if isinstance(first, tuple):
    parts = zip(*trees, strict=True)
    return tuple(_map_arrays(function, *part) for part in parts)
  return function(*trees)


def make_batches(
  loader: SampleLoader | FeatureLoader,
  *,
  weights: Sequence[float],
  batch_size: int,
  position: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int = 2,
  read_ahead: int = 256,
  beside: Sequence[Stream] = (),
) -> grain.IterDataset:
  """Makes the endless batches of one host.

  Args:
    loader: Loads one sample.
    weights: Share of the samples that each source gives.
    batch_size: Clips a batch, over all hosts.
    position: Samples that the run has consumed, over all hosts.
    process_index: Index of this host.
    process_count: Number of hosts.
    num_workers: Decoding processes; 0 decodes in threads of this one.
    num_threads: Samples that are read at the same time, in each worker.
    read_ahead: Clips in the memory of this host beyond the batch that is being
      joined, at most.
    beside: Other streams of the batches, read by the same workers.

  Returns:
    A Grain dataset of batches: the streams of the loaders, of which 'video' has
    'pixels' uint8 `[batch_size / process_count, frames, size, size, 3]`; and
    'failures', what was replaced in this batch, a JSON list a sample.

  Raises:
    UserError: The batch does not split evenly, or `read_ahead` is too small.
  """
  # Grain reads its own flags; programs without absl flags have to say so.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  streams = [Stream(loader, weights, batch_size, position), *beside]
  order = Order(streams, process_index, process_count)
  loader = join_loaders(streams)
  options = _divide_read_ahead(
    read_ahead, num_workers, loader.num_clips, num_threads
  )
  rows = [stream.batch_size // process_count for stream in streams]
  sizes = [stream.loader.clip_bytes / 2**30 for stream in streams]
  logging.info(
    'reading ahead at most %d clips, %.2f GiB; batches of %s a host, %.2f GiB',
    read_ahead,
    read_ahead * max(sizes),
    ' + '.join(map(str, rows)),
    np.dot(rows, sizes),
  )

  def load(loader, number):
    return loader(*order.find(int(number)))

  def read(loader, first):
    samples = grain.MapDataset.range(first, sys.maxsize)
    samples = samples.map(functools.partial(load, loader))
    samples = samples.to_iter_dataset(options)
    if not num_workers:
      return samples
    return grain.experimental.WithOptionsIterDataset(
      samples,
      grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES),
    ).mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=1
      ),
      worker_init_fn=lambda *_: start_reader(loader.max_seconds),
    )

  return _Batches(LastingSamples(loader, read), order.counts)


def _divide_read_ahead(
  read_ahead: int, num_workers: int, num_clips: int, num_threads: int
) -> grain.ReadOptions:
  """Divides the clips that are read ahead among workers and their threads."""
  least = max(num_workers * (_IN_TRANSIT + 1), 1) * num_clips
  if read_ahead < least:
    raise UserError(
      f'data.read_ahead is {read_ahead} clips; data.num_workers={num_workers} '
      f'and {num_clips} clips a video need {least}'
    )
  waiting = read_ahead // (max(num_workers, 1) * num_clips)
  if num_workers:
    waiting -= _IN_TRANSIT
  # Grain's own default would be 500 samples.
  return grain.ReadOptions(min(num_threads, waiting), waiting)
