"""Pairs of a possible and an impossible film, and films whole in memory."""

import csv
import math
import os
from typing import NamedTuple

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.transforms import center_crop
from vjepa_jax.data.video import Limits
from vjepa_jax.errors import UserError

_NEEDED = ('file', 'pair', 'property', 'possible')


class Pair(NamedTuple):
  """Two films, as paths, that are the same until a violation shows."""

  possible: str
  impossible: str
  property: str  # what is violated
  group: str  # pairs of one group were made from the same scene
  screen: bool | None  # it happens out of sight; None where nothing says
  frame: int | None  # first that differs; None where nothing says


def read_pairs(folder: str | os.PathLike[str]) -> list[Pair]:
  """Reads `test.csv` of a physics set, or of a set of one's own.

  The columns file, pair, property and possible (1 or 0) are needed; set, screen
  and frame are not. A pair has two films. Files are relative to the folder.

  Raises:
    FileNotFoundError: There is no manifest.
    UserError: It lacks a column, or a pair is not one of each kind.
  """
  path = os.path.join(folder, 'test.csv')
  if not storage.exists(path):
    raise FileNotFoundError(
      f'{path} does not exist: write a physics set with python -m '
      f'vjepa_jax.tools.physics_set --output={folder}, or give another --input'
    )
  reader = csv.DictReader(storage.read(path).decode().splitlines())
  for column in _NEEDED:
    if column not in (reader.fieldnames or ()):
      raise UserError(
        f'{path} has no column {column!r}, it needs {", ".join(_NEEDED)}'
      )
  films: dict[str, list[dict[str, str]]] = {}
  for row in reader:
    films.setdefault(row['pair'], []).append(row)
  if not films:
    raise UserError(f'{path} lists no films')
  pairs = []
  for key, pair in films.items():
    pair.sort(key=lambda film: film['possible'])
    if [film['possible'] for film in pair] != ['0', '1']:
      raise UserError(
        f'{path}: pair {key} must have one possible (1) and one impossible (0) '
        f'film, it has {[film["possible"] for film in pair]}'
      )
    impossible, possible = pair
    screen, frame = impossible.get('screen'), impossible.get('frame')
    pairs.append(
      Pair(
        os.path.join(folder, possible['file']),
        os.path.join(folder, impossible['file']),
        impossible['property'],
        group=impossible.get('set') or key,
        screen=bool(int(screen)) if screen else None,
        frame=int(frame) if frame else None,
      )
    )
  return pairs


def read_film(path: str, resolution: int, frame_step: int = 1) -> np.ndarray:
  """Reads every `frame_step`-th frame of a whole film, its central square.

  Args:
    path: The file.
    resolution: Height and width of the result.
    frame_step: Frames of the file a frame that is read.

  Returns:
    uint8 `[frames, resolution, resolution, 3]`.

  Raises:
    DecodeError: The film cannot be read.
  """
  # A long film takes long; nothing waits for it.
  with open_video(path, Limits(seconds=math.inf)) as video:
    frames = range(0, video.num_frames, frame_step)
    box = center_crop(video.height, video.width)
    return video.read(frames, box, (resolution, resolution))
