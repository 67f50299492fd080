"""Videos and images in tar files, as WebDataset writes them.

The members of a sample are next to each other, their names equal up to the
first dot: `000123.mp4` and `000123.cls`, which holds the number of its class.
The tars are read once, members skipped, to learn where everything is; after
that a sample is one read, in any order.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import hashlib
import os
import tarfile
from typing import NamedTuple

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.records import NO_LABEL, Record
from vjepa_jax.data.video import DecodeError
from vjepa_jax.errors import UserError

_THREADS = 16


class _Member(NamedTuple):
  """A video or image in a tar."""

  name: str
  start: int
  size: int
  label: int


class TarSource(Sequence[Record]):
  """The videos of tar files, one after the other; can be pickled."""

  def __init__(self, paths: Sequence[str], extensions: frozenset[str]) -> None:
    """Reads where the videos are.

    Args:
      paths: Of the tars, which stay as they are.
      extensions: Of the members that are videos or images.

    Raises:
      UserError: A tar is damaged, compressed or remote, or its class is no
        number.
    """
    self._paths = list(paths)
    self.path = self._paths[0]
    if storage.is_remote(self._paths[0]):
      raise UserError(
        f'{self._paths[0]}: tars have to be local, mount or copy them'
      )
    with futures.ThreadPoolExecutor(_THREADS) as threads:
      tars = list(
        threads.map(lambda path: list(_find(path, extensions)), self._paths)
      )
    members = [member for tar in tars for member in tar]
    if not members:
      raise UserError(f'no videos or images in {self._paths[0]}')
    self._ends = np.cumsum([len(tar) for tar in tars])
    self._places = np.array([m[1:] for m in members], np.int64)
    names = [os.fsencode(member.name) for member in members]
    self._names = b''.join(names)
    self._name_ends = np.cumsum([len(name) for name in names])

  def __repr__(self) -> str:
    return f'TarSource({self.path!r}, {len(self)} videos)'

  def __len__(self) -> int:
    return len(self._places)

  def hash_names(self) -> str:
    """Hashes the names of the members, and their labels."""
    labels = self._places[:, 2].tobytes()
    return hashlib.sha256(self._names + labels).hexdigest()

  def __getitem__(self, index: int) -> Record:
    index = range(len(self))[index]
    path = self._paths[int(np.searchsorted(self._ends, index, 'right'))]
    start, size, label = self._places[index].tolist()
    begin = int(self._name_ends[index - 1]) if index else 0
    member = os.fsdecode(self._names[begin : int(self._name_ends[index])])
    name = f'{os.path.basename(path)}/{member}'
    try:
      with open(path, 'rb') as file:
        file.seek(start)
        content = file.read(size)
    except FileNotFoundError as e:
      raise DecodeError('its tar is gone', name) from e
    if len(content) < size:
      raise DecodeError('its tar is cut off', name)
    return Record(content, label, name)


def _find(path: str, extensions: frozenset[str]) -> Iterator[_Member]:
  """Yields the videos of a tar."""
  sample, video, label = None, None, NO_LABEL
  try:
    with tarfile.open(path, 'r:') as tar:
      for member in tar:
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition('.')
        if not member.isreg() or not stem:
          continue
        if sample != (folder, stem):
          if video is not None:
            yield video._replace(label=label)
          sample, video, label = (folder, stem), None, NO_LABEL
        if extension in ('cls', 'cls.txt'):
          label = int(tar.extractfile(member).read())
        elif os.path.splitext(name)[1].lower() in extensions:
          place = member.offset_data, member.size
          video = _Member(member.name, *place, NO_LABEL)
        tar.members = []  # It would keep all.
      # It takes anything that is no header for the end, which is empty.
      tar.fileobj.seek(tar.offset)
      if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b'\0'):
        raise UserError(f'damaged or cut off at byte {tar.offset}')
  except (tarfile.TarError, ValueError) as e:
    raise UserError(f'cannot read {path}: {e}') from e
  if video is not None:
    yield video._replace(label=label)
