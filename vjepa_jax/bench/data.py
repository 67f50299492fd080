"""`bench data`: decoding and batches, against decord and torchcodec."""

import argparse
from collections.abc import Mapping, Sequence
import time
from typing import Any

import grain
import numpy as np

from vjepa_jax.bench import measure, videos
from vjepa_jax.bench.decoders import Clip, Reader, make_readers
from vjepa_jax.data import pipeline, transforms
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.records import NO_LABEL, Record
from vjepa_jax.data.sampling import sample_frames
from vjepa_jax.errors import UserError
from vjepa_jax.masks.fixed_size import MaskSampler
from vjepa_jax.masks.multiblock import MultiBlock

_AIM = 0.5
_WORKERS = (0, 1, 2)
_BATCHES = 6
# The published masks of 16 x 224 px: blocks and their scale; then their counts
# of context and target tokens.
_BLOCKS = (8, 0.15), (2, 0.7)
_COUNTS = (360, 752), (104, 1104)


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this sub-command."""
  videos.add_options(parser)
  parser.add_argument(
    '--step_seconds',
    type=float,
    default=0.5,
    help='length of the step that waits for batches (0.5)',
  )
  parser.add_argument(
    '--batch_size', type=int, default=8, help='clips a batch (8)'
  )


class _Files(tuple):
  """Paths as a source of videos."""

  def __getitem__(self, index: int) -> Record:
    path = super().__getitem__(index)
    return Record(path, NO_LABEL, path)


def draw_clips(
  paths: Sequence[str], *, frames: int, step: int, resolution: int
) -> list[Clip]:
  """Draws one random clip from each file, as pretraining does."""
  clips = []
  rng = np.random.default_rng(0)
  for path in paths:
    with open_video(path) as video:
      (indices,) = sample_frames(video.times, frames, frame_step=step, rng=rng)
      box = transforms.random_resized_crop(video.height, video.width, rng=rng)
    clips.append(Clip(path, indices, box, (resolution, resolution)))
  return clips


def compare_decoders(
  readers: Mapping[str, Reader], clips: Sequence[Clip], rounds: int, label: str
) -> dict[str, Any]:
  """Times the reading of clips, in CPU seconds a clip.

  Args:
    readers: By name, ours among them.
    clips: One is read in each round, in turn.
    rounds: Clips to read.
    label: Of the case.
  """
  runs = {
    name: lambda i, read=read: read(clips[i % len(clips)])
    for name, read in readers.items()
  }
  # CPU time of all threads: clips a second of one core, whoever else runs.
  times = measure.alternate(runs, rounds, clock=time.process_time, label=label)
  return {'unit': 'CPU s a clip', **measure.compare(times)}


def make_loader(paths: Sequence[str], quick: bool) -> pipeline.SampleLoader:
  """Makes the loader of the published recipe at 224 px, or of a toy."""
  options, grid, counts = ClipOptions(), (8, 14, 14), _COUNTS
  if quick:
    options = ClipOptions(frames=8, resolution=48, frame_step=2)
    grid, counts = (4, 6, 6), [(8, 24)] * 2
  samplers = tuple(
    MaskSampler(MultiBlock(blocks, (scale, scale)), grid, *pair)
    for (blocks, scale), pair in zip(_BLOCKS, counts, strict=True)
  )
  return pipeline.SampleLoader((_Files(paths),), options, samplers, seed=0)


def time_batches(
  loader: pipeline.SampleLoader,
  num_workers: int,
  batch_size: int,
  step_seconds: float,
  num_batches: int,
) -> dict[str, float]:
  """Times batches that are taken as fast as they come, then one a step.

  Args:
    loader: What loads a sample.
    num_workers: Decoding processes.
    batch_size: Clips a batch.
    step_seconds: Time between two batches in the second part.
    num_batches: Batches to time each way, after the first.

  Returns:
    'clips_per_second' of the first part, 'wait_share' of the second: the share
    of the time that the step waited for its batch.
  """
  dataset = pipeline.make_batches(
    loader, weights=[1.0], batch_size=batch_size, num_workers=num_workers
  )
  # One batch is ready when the step asks, as in training.
  batches = iter(
    grain.experimental.ThreadPrefetchIterDataset(
      dataset, prefetch_buffer_size=2
    )
  )
  try:
    # What was read ahead while the workers started must not count.
    for _ in range(num_workers + 3):
      next(batches)
    begin = time.perf_counter()
    for _ in range(num_batches):
      next(batches)
    clips_per_second = num_batches * batch_size / (time.perf_counter() - begin)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(num_batches):
      time.sleep(step_seconds)
      asked = time.perf_counter()
      next(batches)
      waited += time.perf_counter() - asked
    wait_share = waited / (time.perf_counter() - begin)
  finally:
    batches.close()
  return {'clips_per_second': clips_per_second, 'wait_share': wait_share}


def compare_workers(
  loader: pipeline.SampleLoader, arguments: argparse.Namespace, repeats: int
) -> dict[str, dict[str, float]]:
  """Times the pipeline with each number of workers, in turn.

  Returns:
    Medians over the repeats, see `time_batches`, by number of workers.
  """
  runs = {str(n): [] for n in _WORKERS}
  num_batches = 2 if arguments.quick else _BATCHES
  for _ in range(repeats):
    for name, values in runs.items():
      values.append(
        time_batches(
          loader,
          int(name),
          arguments.batch_size,
          arguments.step_seconds,
          num_batches,
        )
      )
  return {
    name: {key: float(np.median([v[key] for v in values])) for key in values[0]}
    for name, values in runs.items()
  }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Times all readers on all cases, then the pipeline on the first case."""
  if arguments.batch_size < 1 or arguments.step_seconds < 0:
    raise UserError('--batch_size and --step_seconds must be positive')
  quick = arguments.quick
  rounds = arguments.rounds or (2 if quick else 24)
  files = videos.find_cases(arguments)
  readers = make_readers()
  shape = {'frames': 8, 'step': 2, 'resolution': 48}
  if not quick:
    shape = {'frames': 16, 'step': 4, 'resolution': 224}
  cases = {}
  for name, paths in files.items():
    clips = draw_clips(paths * -(-rounds // len(paths)), **shape)
    cases[name] = compare_decoders(readers, clips, rounds, name)
    cases[name]['files'] = len(paths)
  peers = [name for name in readers if name != measure.OURS]
  print(
    f'{shape["frames"]} frames of step {shape["step"]} to {shape["resolution"]}'
    ' px: clips a second of one core, and ours / theirs in time'
  )
  measure.print_table(
    ['', measure.OURS, *peers, *(f'ours/{peer}' for peer in peers)],
    [
      [
        name,
        1 / case['ours']['median'],
        *(1 / case['peer'][peer]['median'] for peer in peers),
        *(case['ratio'][peer] for peer in peers),
      ]
      for name, case in cases.items()
    ],
  )
  ratio = measure.join_ratios(list(cases.values()))
  for peer, value in ratio.items():
    aim = f' (aim: {_AIM} or less)' if peer == 'decord' else ''
    print(f'ours / {peer}, geometric mean: {value:.2f}{aim}')
  first = next(iter(files))
  workers = compare_workers(
    make_loader(files[first], quick), arguments, 1 if quick else 3
  )
  print(
    f'decode, crop, flip, masks, batches of {arguments.batch_size}: {first}'
  )
  measure.print_table(
    ['workers', 'clips/s', f'waits in a {arguments.step_seconds:g} s step'],
    [
      [name, w['clips_per_second'], f'{w["wait_share"]:.0%}']
      for name, w in workers.items()
    ],
  )
  return {
    'ratio': ratio,
    'ours': {name: case['ours'] for name, case in cases.items()},
    'peer': {name: case['peer'] for name, case in cases.items()},
    'cases': cases,
    'workers': workers,
  }
