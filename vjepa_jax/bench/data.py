"""`bench data`: decoding and batches, against decord and torchcodec."""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
import sys
import time
from typing import Any, NamedTuple

import grain
import numpy as np

from configs import vjepa1
from vjepa_jax.bench import measure, videos
from vjepa_jax.bench.measure import OURS
from vjepa_jax.data import pipeline, pixels, storage, transforms
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.pixels import Box
from vjepa_jax.data.sampling import sample_frames
from vjepa_jax.errors import UserError
from vjepa_jax.tasks.pretrain import make_loader

_AIM = 0.5
_WORKERS = (0, 1, 2)


OPTIONS = videos.OPTIONS | {
  'step_seconds': {
    'type': float,
    'default': 0.5,
    'help': 'length of the step that waits for batches (0.5)',
  },
  'batch_size': {'type': int, 'default': 8, 'help': 'clips a batch (8)'},
}


class Clip(NamedTuple):
  """A clip to read."""

  path: str  # video file
  indices: np.ndarray  # int64 [T], frame numbers
  box: Box  # (top, left, height, width) of the crop, pixels
  size: tuple[int, int]  # (height, width) of the result, pixels


Reader = Callable[[Clip], np.ndarray]


def read_ours(clip: Clip) -> np.ndarray:
  """Reads uint8 `[T, height, width, 3]` as the pipeline does."""
  with open_video(clip.path) as video:
    return video.read(clip.indices, clip.box, clip.size)


def _read_decord(clip: Clip) -> np.ndarray:
  decord = import_module('decord')
  video = decord.VideoReader(clip.path, ctx=decord.cpu(0), num_threads=1)
  return _crop(video.get_batch(clip.indices).asnumpy(), clip)


def _read_torchcodec(clip: Clip) -> np.ndarray:
  # 'approximate' does not scan the file first, which is torchcodec's fastest.
  video = import_module('torchcodec.decoders').VideoDecoder(
    clip.path,
    dimension_order='NHWC',
    num_ffmpeg_threads=1,
    seek_mode='approximate',
  )
  return _crop(video.get_frames_at(clip.indices.tolist()).data.numpy(), clip)


def _crop(frames: np.ndarray, clip: Clip) -> np.ndarray:
  crops = (pixels.crop(frame, clip.box) for frame in frames)
  return np.stack([pixels.resize(crop, clip.size) for crop in crops])


def make_readers() -> dict[str, Reader]:
  """Returns our reader and those of the peers that can be loaded.

  A peer that cannot is named on standard error in one line, with what to do.
  """
  readers = {OURS: read_ours}
  for module, read in (
    ('decord', _read_decord),
    ('torchcodec.decoders', _read_torchcodec),
  ):
    name = module.partition('.')[0]
    try:
      import_module(module)
      readers[name] = read
    except ImportError:
      print(f"{name} is left out: pip install -e '.[bench]'", file=sys.stderr)
    except (OSError, RuntimeError) as error:
      # torchcodec says in dozens of lines that libav* is not there.
      reason = 'it finds no FFmpeg libraries (apt-get install ffmpeg)'
      if 'FFmpeg' not in str(error):
        reason = str(error).strip().partition('\n')[0]
      print(f'{name} is left out: {reason}', file=sys.stderr)
  return readers


def draw_clips(paths: Sequence[str], count: int) -> list[Clip]:
  """Draws one random clip from each file in turn, 16 frames of step 4."""
  clips = []
  rng = np.random.default_rng(0)
  for i in range(count):
    path = paths[i % len(paths)]
    with open_video(path) as video:
      (indices,) = sample_frames(video.times, 16, frame_step=4, rng=rng)
      box = transforms.random_resized_crop(video.height, video.width, rng=rng)
    clips.append(Clip(path, indices, box, (224, 224)))
  return clips


def time_batches(
  loader: pipeline.SampleLoader,
  num_workers: int,
  batch_size: int,
  step_seconds: float,
  num_batches: int,
) -> tuple[float, float]:
  """Times batches that are taken as fast as they come, then one a step.

  Args:
    loader: What loads a sample.
    num_workers: Decoding processes.
    batch_size: Clips a batch.
    step_seconds: Time between two batches in the second part.
    num_batches: Batches to time each way, after the first.

  Returns:
    Clips a second of the first part; of the second, the share of the time that
    the step waited for its batch.
  """
  read_ahead = max(4 * batch_size, 8 * num_workers)
  dataset = pipeline.make_batches(
    loader,
    weights=[1.0],
    batch_size=batch_size,
    num_workers=num_workers,
    read_ahead=read_ahead,
  )
  # One batch is ready when the step asks, as in training.
  batches = iter(
    grain.experimental.ThreadPrefetchIterDataset(
      dataset, prefetch_buffer_size=2
    )
  )

  def take(count, pause=0.0):
    """Takes batches; returns the seconds of all, and those of waiting."""
    waited, begin = 0.0, time.perf_counter()
    for _ in range(count):
      time.sleep(pause)
      asked = time.perf_counter()
      next(batches)
      waited += time.perf_counter() - asked
    return time.perf_counter() - begin, waited

  try:
    # What was read ahead while the workers started must not count.
    take(read_ahead // batch_size + 3)
    seconds, _ = take(num_batches)
    total, waited = take(num_batches, step_seconds)
  finally:
    batches.close()
  return num_batches * batch_size / seconds, waited / total


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Times all readers on all cases, then the pipeline on the first case."""
  if arguments.batch_size < 1 or arguments.step_seconds < 0:
    raise UserError('--batch_size and --step_seconds must be positive')
  quick = arguments.quick
  rounds = arguments.rounds or (2 if quick else 24)
  globs = videos.find_cases(arguments)
  readers = make_readers()
  cases = {}
  for name, pattern in globs.items():
    paths = sorted(storage.match(pattern))
    clips = draw_clips(paths, rounds)
    runs = {
      peer: lambda i, read=read, clips=clips: read(clips[i])
      for peer, read in readers.items()
    }
    # CPU time of all threads: clips a second of one core, whoever else runs.
    times = measure.alternate(runs, rounds, clock=time.process_time, label=name)
    cases[name] = {
      'unit': 'CPU s a clip',
      'files': len(paths),
      **measure.compare(times),
    }
  measure.print_cases(cases, 'clips a second of one core', lambda t: 1 / t)
  result = measure.join(cases)
  for peer, value in result['ratio'].items():
    aim = f' (aim: {_AIM} or less)' if peer == 'decord' else ''
    print(f'ours / {peer}, geometric mean: {value:.2f}{aim}')
  config = vjepa1.get_config('l16')
  first = next(iter(globs))
  config.data.sources = {'bench': {'path': globs[first], 'weight': 1.0}}
  result['workers'] = _compare_workers(make_loader(config), arguments)
  print(
    f'decode, crop, flip, masks, batches of {arguments.batch_size}: {first}'
  )
  measure.print_table(
    ['workers', 'clips/s', f'waits in a {arguments.step_seconds:g} s step'],
    [
      [name, w['clips_per_second'], f'{w["wait_share"]:.0%}']
      for name, w in result['workers'].items()
    ],
  )
  return result


def _compare_workers(loader, arguments) -> dict[str, dict[str, float]]:
  """Times the pipeline with each number of workers, in turn: medians."""
  quick = arguments.quick
  size, pause = arguments.batch_size, arguments.step_seconds
  runs = {str(n): [] for n in _WORKERS}
  for _ in range(1 if quick else 3):
    for name, found in runs.items():
      num_batches = 2 if quick else 6
      found.append(time_batches(loader, int(name), size, pause, num_batches))
  names = 'clips_per_second', 'wait_share'
  return {
    name: dict(zip(names, np.median(found, axis=0).tolist(), strict=True))
    for name, found in runs.items()
  }
