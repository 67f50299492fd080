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

from vjepa_jax.data import decode, sampling, sources, transforms

MaskSampler = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]

# Videos that may fail in a row before the fault is not theirs.
_MAX_ATTEMPTS = 100
_MASK_STREAM = 2**31


@dataclasses.dataclass(frozen=True)
class ClipOptions:
  """How clips are cut from a video.

  Attributes:
    frames: Frames of a clip.
    resolution: Height and width of a clip, pixels.
    frame_step: Video frames from one clip frame to the next; or
    fps: clip frames per second. Exactly one of the two.
    num_clips: Clips cut from each video that is opened.
    crop_scale: Range of the random crop's share of the frame.
    crop_aspect_ratio: Range of its width over height.
    flip: Probability of a horizontal flip.
    views: Crops of each clip in evaluation: the centre, or so many squares
      along the long side; in training there is one, at random.
  """

  frames: int = 16
  resolution: int = 224
  frame_step: int | None = 4
  fps: float | None = None
  num_clips: int = 1
  crop_scale: tuple[float, float] = (0.3, 1.0)
  crop_aspect_ratio: tuple[float, float] = (0.75, 1.35)
  flip: float = 0.5
  views: int = 1

  def __post_init__(self):
    if (self.frame_step is None) == (self.fps is None):
      raise ValueError(
        'set exactly one of frame_step and fps for clips, got '
        f'frame_step={self.frame_step} and fps={self.fps}'
      )


def read_clips(
  record: sources.Record,
  options: ClipOptions,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """Cuts clips from one video.

  Args:
    record: The video.
    options: How to cut.
    rng: Decides times, crops and flips (one of each a clip); None takes the
      deterministic times and the centre crop of evaluation.

  Returns:
    uint8 `[num_clips, frames, resolution, resolution, 3]`; in evaluation
    `[num_clips * views, ...]`, the views of a clip one after the other.

  Raises:
    DecodeError: The video cannot be read.
  """
  return read_timed_clips(record, options, rng)[0]


def read_timed_clips(
  record: sources.Record,
  options: ClipOptions,
  rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts clips as `read_clips`, and says when their frames are shown.

  Returns:
    The clips, and the times float64 `[num_clips, frames]`, in seconds.

  Raises:
    DecodeError: The video cannot be read.
  """
  size = (options.resolution, options.resolution)
  clips = []
  with decode.open_video(record.video) as video:
    indices = sampling.sample_frames(
      video.times,
      options.frames,
      frame_step=options.frame_step,
      fps=options.fps,
      num_clips=options.num_clips,
      rng=rng,
    )
    for clip_indices in indices:
      if rng is None:
        boxes = [transforms.center_crop(video.height, video.width)]
        if options.views > 1:
          boxes = transforms.spread_crops(
            video.height, video.width, options.views
          )
        clips += [video.read(clip_indices, box, size) for box in boxes]
        continue
      box = transforms.random_resized_crop(
        video.height,
        video.width,
        scale=options.crop_scale,
        aspect_ratio=options.crop_aspect_ratio,
        rng=rng,
      )
      flip = rng.random() < options.flip
      clip = video.read(clip_indices, box, size)
      clips.append(transforms.flip_horizontal(clip) if flip else clip)
    return np.stack(clips), video.times[indices]


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
    source_index, item = key
    source = self.sources[source_index]
    failures = []
    for attempt in range(_MAX_ATTEMPTS):
      rng = np.random.default_rng((self.seed, position, attempt))
      if attempt:
        item = int(rng.integers(len(source)))
      record = source[item]
      try:
        video = read_clips(record, self.options, rng)
        break
      except decode.DecodeError as error:
        failures.append({'name': record.name, 'reason': str(error)})
    else:
      raise RuntimeError(
        f'{_MAX_ATTEMPTS} videos in a row could not be read, the last one '
        f'{failures[-1]["name"]}: {failures[-1]["reason"]}'
      )
    masks = [
      [
        sampler(
          np.random.default_rng((self.seed, position, _MASK_STREAM + clip, i))
        )
        for clip in range(len(video))
      ]
      for i, sampler in enumerate(self.mask_samplers)
    ]
    stream = {
      'pixels': video,
      'masks': tuple(
        {
          'context': np.stack([context for context, _ in clips]),
          'target': np.stack([target for _, target in clips]),
        }
        for clips in masks
      ),
    }
    if self.num_classes is not None:
      check_label(record, self.num_classes)
      stream['label'] = np.full(len(video), record.label, np.int32)
    return {
      'video': stream,
      'failures': json.dumps(failures) if failures else '',
    }


def check_label(record: sources.Record, num_classes: int) -> None:
  """Raises ValueError unless a record has one of the labels 0, 1, ..."""
  if not 0 <= record.label < num_classes:
    label = 'no label' if record.label < 0 else f'label {record.label}'
    raise ValueError(
      f'{record.name} has {label}, training needs one from 0 to '
      f'{num_classes - 1}'
    )


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
