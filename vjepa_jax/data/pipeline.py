"""From sources of videos to batches of clips and masks, by Grain.

Everything random about a sample is a pure function of (seed, position of the
sample in the run). Batch k holds the same samples in the same order for any
number of hosts, workers and threads, so that its position is all that a
checkpoint needs to resume on the very next batch.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from typing import Any

from absl import flags
import grain
import numpy as np

from vjepa_jax.data.clip import ClipOptions, read_clips
from vjepa_jax.data.records import Record, check_label
from vjepa_jax.data.video import DecodeError

MaskSampler = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]

# Videos that may fail in a row before the fault is not theirs.
_MAX_ATTEMPTS = 100
_MASK_STREAM = 2**31


@dataclasses.dataclass(frozen=True)
class SampleLoader:
  """Loads one sample: clips of a video that can be read, and their masks.

  Attributes:
    sources: Where videos come from.
    options: How clips are cut.
    mask_samplers: One a mask spec.
    seed: Seed of the run.
    num_classes: For training with labels; None leaves labels out.
  """

  sources: tuple[Any, ...]
  options: ClipOptions
  mask_samplers: tuple[MaskSampler, ...]
  seed: int
  num_classes: int | None = None

  @property
  def num_clips(self) -> int:
    """Clips of a sample."""
    return self.options.num_clips

  def __call__(self, position: int, key: tuple[int, int]) -> dict[str, Any]:
    """Loads the sample at a position of the run.

    Args:
      position: Position in the run, counted over all hosts.
      key: Source and index in it. If that video fails, others of the same
        source are drawn, deterministically.

    Returns:
      The stream 'video': 'pixels' uint8 `[num_clips, frames, size, size, 3]`,
      'masks', a tuple with 'context' int32 `[num_clips, Kc]` and 'target'
      `[num_clips, Kt]` a spec, with `num_classes` a 'label' int32
      `[num_clips]`; and 'failures', a JSON list of {name, reason} for the
      videos that failed.

    Raises:
      RuntimeError: 100 videos in a row failed.
      ValueError: A video has no label, or one outside of the classes.
    """
    record, clips, failures = self._read(position, *key)
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
    return {
      'video': stream,
      'failures': json.dumps(failures) if failures else '',
    }

  def _read(
    self, position: int, source_index: int, item: int
  ) -> tuple[Record, np.ndarray, list[dict[str, str]]]:
    """Reads the clips of the first video that can be read."""
    source = self.sources[source_index]
    failures = []
    for attempt in range(_MAX_ATTEMPTS):
      rng = np.random.default_rng((self.seed, position, attempt))
      if attempt:
        item = int(rng.integers(len(source)))
      record = source[item]
      try:
        return record, read_clips(record, self.options, rng), failures
      except DecodeError as error:
        failures.append({'name': record.name, 'reason': str(error)})
    raise RuntimeError(
      f'{_MAX_ATTEMPTS} videos in a row could not be read, the last one '
      f'{failures[-1]["name"]}: {failures[-1]["reason"]}'
    )

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


def _join(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Joins samples `[num_clips, ...]` to a batch `[B, ...]`."""
  failures = [s['failures'] for s in samples if s['failures']]
  streams = [{k: v for k, v in s.items() if k != 'failures'} for s in samples]
  return {
    **_concatenate(streams),
    'failures': np.array(failures, dtype=np.str_),
  }


def _concatenate(trees: Sequence[Any]) -> Any:
  """Concatenates arrays at the same place of several trees."""
  first = trees[0]
  if isinstance(first, Mapping):
    return {name: _concatenate([t[name] for t in trees]) for name in first}
  if isinstance(first, tuple):
    return tuple(map(_concatenate, zip(*trees, strict=True)))
  return np.concatenate(trees)


def _index(
  lengths: Sequence[int], weights: Sequence[float], seed: int
) -> grain.MapDataset:
  """Endless dataset of (source, index), shuffled anew each epoch."""
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


def make_batches(
  loader: SampleLoader,
  *,
  weights: Sequence[float],
  batch_size: int,
  position: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int = 2,
) -> grain.IterDataset:
  """Makes the endless batches of one host.

  Args:
    loader: Loads one sample: a SampleLoader, or what loads as one.
    weights: Share of the samples that each source gives.
    batch_size: Clips a batch, over all hosts.
    position: Samples that the run has consumed, over all hosts.
    process_index: Index of this host.
    process_count: Number of hosts.
    num_workers: Decoding processes; 0 decodes in threads of this one.
    num_threads: Batches that are read at the same time, in each worker. They
      bound the read-ahead: Grain's default of 500 elements would be batches.

  Returns:
    A Grain dataset of batches: the streams of `SampleLoader`, of which 'video'
    has 'pixels' uint8 `[batch_size / process_count, frames, size, size, 3]`;
    and 'failures', what was replaced in this batch, a JSON list each.

  Raises:
    ValueError: The batch does not split evenly.
  """
  num_clips = loader.num_clips
  if batch_size % (num_clips * process_count):
    raise ValueError(
      f'batch size {batch_size} is not divisible by {process_count} hosts x '
      f'{num_clips} clips a video'
    )
  # Grain reads its own flags; programs without absl flags have to say so.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  samples = _index([len(s) for s in loader.sources], weights, loader.seed)
  samples = samples.map_with_index(loader)[position:]
  # Batches before the split over hosts and workers: row r of batch k is the
  # same sample for any number of either.
  rows = batch_size // num_clips // process_count
  batches = samples.batch(rows, batch_fn=_join)[process_index::process_count]
  dataset = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
  )
  if num_workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=1
      )
    )
  return dataset
