"""Pairs of a possible and an impossible film, and films whole in memory."""

import csv
import os
from typing import NamedTuple

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.transforms import center_crop

_NEEDED = ('file', 'pair', 'property', 'possible')


class Pair(NamedTuple):
  """Two films that are the same until a violation shows.

  Attributes:
    possible: File of the possible film.
    impossible: File of its twin.
    property: What is violated.
    group: Pairs of one group were made from the same scene.
    screen: The violation happens out of sight; None where the manifest does
      not say.
    frame: First frame in which the films differ, None where it does not say.
  """

  possible: str
  impossible: str
  property: str
  group: str
  screen: bool | None
  frame: int | None


def read_pairs(folder: str | os.PathLike[str]) -> list[Pair]:
  """Reads `test.csv` of a physics set, or of a set of one's own.

  The columns file, pair, property and possible (1 or 0) are needed; set, screen
  and frame are not. A pair has two films. Files are relative to the folder.

  Raises:
    FileNotFoundError: There is no manifest.
    ValueError: It lacks a column, or a pair is not one of each kind.
  """
  path = os.path.join(folder, 'test.csv')
  if not storage.exists(path):
    raise FileNotFoundError(
      f'{path} does not exist: write a physics set with python -m '
      f'vjepa_jax.tools.physics_set --output={folder}, or give another --input'
    )
  reader = csv.DictReader(storage.read(path).decode().splitlines())
  missing = [c for c in _NEEDED if c not in (reader.fieldnames or ())]
  if missing:
    raise ValueError(
      f'{path} has no column {missing[0]!r}, it needs {", ".join(_NEEDED)}'
    )
  rows: dict[str, list[dict[str, str]]] = {}
  for row in reader:
    rows.setdefault(row['pair'], []).append(row)
  if not rows:
    raise ValueError(f'{path} lists no films')
  return [_make_pair(path, key, films) for key, films in rows.items()]


def _make_pair(path: str, key: str, films: list[dict[str, str]]) -> Pair:
  if sorted(film['possible'] for film in films) != ['0', '1']:
    raise ValueError(
      f'{path}: pair {key} must have one possible (1) and one impossible (0) '
      f'film, it has {[film["possible"] for film in films]}'
    )
  impossible, possible = sorted(films, key=lambda film: film['possible'])
  screen, frame = impossible.get('screen'), impossible.get('frame')
  return Pair(
    os.path.join(os.path.dirname(path), possible['file']),
    os.path.join(os.path.dirname(path), impossible['file']),
    impossible['property'],
    impossible.get('set') or key,
    bool(int(screen)) if screen else None,
    int(frame) if frame else None,
  )


def read_film(path: str, resolution: int, frame_step: int = 1) -> np.ndarray:
  """Reads every `frame_step`-th frame of a whole film.

  Args:
    path: The file.
    resolution: Height and width to bring the centre crop of evaluation to.
    frame_step: Frames of the file a frame that is read.

  Returns:
    uint8 `[frames, resolution, resolution, 3]`.

  Raises:
    DecodeError: The film cannot be read.
  """
  with open_video(path) as video:
    frames = range(0, video.num_frames, frame_step)
    box = center_crop(video.height, video.width)
    return video.read(frames, box, (resolution, resolution))
