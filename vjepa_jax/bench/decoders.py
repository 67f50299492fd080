"""Readers of clips: ours, and the peers with the same result."""

from collections.abc import Callable
from importlib import import_module
import sys
from typing import NamedTuple

import numpy as np

from vjepa_jax.bench.measure import OURS
from vjepa_jax.data import pixels
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.pixels import Box


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
