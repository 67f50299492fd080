"""Where videos come from: folders, manifests, shards, tars, TFDS.

A source has a length and random access to `Record`s, and decodes nothing. All
sources can be pickled at the speed of a memory copy, since each worker process
of the loader receives one.
"""

import array
from collections.abc import Iterable, Sequence
import functools
import glob
import hashlib
import os
import re
from typing import Protocol

import numpy as np

from vjepa_jax.data import images, manifests, storage
from vjepa_jax.data.cache import open_cache
from vjepa_jax.data.records import NO_LABEL, Record, VideoFeatures, unpack
from vjepa_jax.data.remote_shards import RemoteShards
from vjepa_jax.data.shards import Shards, check_complete
from vjepa_jax.data.tars import TarSource
from vjepa_jax.data.video import DecodeError, describe_error
from vjepa_jax.errors import UserError

VIDEO_EXTENSIONS = frozenset([
  '.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.m1v',
  '.m2v', '.ts', '.m2ts', '.mts', '.vob', '.wmv', '.asf', '.flv', '.f4v',
  '.3gp', '.3g2', '.ogv', '.ogg', '.rm', '.rmvb', '.swf', '.gif',
])  # fmt: skip
_SHARD_PATTERN = re.compile(r'\.array_?record', re.IGNORECASE)
# How many paths of a manifest are looked up before training starts. All would
# take minutes on network storage.
_NUM_PROBED_PATHS = 16


class Source(Protocol):
  """Random access to records."""

  path: str  # with the name of a record, which one it is of all

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record:
    """Reads one record.

    Raises:
      DecodeError: It is damaged, or of another form; the error has its name.
    """

  def hash_names(self) -> str:
    """Hashes which records there are, in their order, without reading them."""


def open_source(path: str, **options) -> Source:
  """Opens a source by the form of its path.

  Args:
    path: one of
      `tfds:name/split`: a TFDS data set in ArrayRecord format;
      `*.array_record*` or `*.arrayrecord*`, a file or a glob of shards;
      `*.csv`, `*.txt`, `*.tsv` or `*.manifest`: lines of a path and a label;
      `*.jsonl` or `*.parquet`: a table of them;
      `*.tar`, a file or a glob: those of WebDataset;
      a folder: of shards if it holds any, else of videos, of tars, of images;
      any other glob: video files, or else images.
    **options: further arguments of the source's class.

  Returns:
    The source.

  Raises:
    FileNotFoundError: if the path or what it should contain does not exist.
    UserError: if a manifest or the path is malformed.
  """
  path = os.fspath(path)
  open_cache()  # A mistake in its settings is one of all videos.
  if path.startswith('tfds:'):
    name, _, split = path.removeprefix('tfds:').rpartition('/')
    if not name:
      raise UserError(
        f'{path!r} names no split: write tfds:name/split, for example '
        'tfds:moving_mnist/test'
      )
    return TfdsSource(name, split, **options)
  if _SHARD_PATTERN.search(os.path.basename(path)):
    return ArrayRecordSource(path, **options)
  if manifests.get_extension(path) in manifests.EXTENSIONS:
    return ManifestSource(path, **options)
  files = storage.list_files(path)  # once: remote folders may be large
  shards = _pick_shards(path, files)
  if shards:
    return ArrayRecordSource(path, shards, **options)
  tars = sorted(file for file in files if file.lower().endswith('.tar'))
  if tars and not any(map(_has_video_extension, files)):
    extensions = VIDEO_EXTENSIONS | images.EXTENSIONS
    return TarSource(tars, extensions, **options)
  return FolderSource(path, files, **options)


class _Named:
  """What is common to sources: they say what they are."""

  path: str

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.path!r}, {len(self)} videos)'


class FolderSource(_Named):
  """All video files below a folder or matching a glob, sorted, unlabelled.

  Where there are none, all images. The labels of those below a folder are the
  places of the folders, right below it, among the sorted ones.
  """

  def __init__(self, path: str, files: Sequence[str] | None = None) -> None:
    """Takes, or lists, the files below a folder or of a glob (`**` allowed)."""
    self.path = path = os.fspath(path)
    files = storage.list_files(path) if files is None else files
    found = sorted(filter(_has_video_extension, files))
    self._labels = None
    if not found:
      found = sorted(filter(_is_image, files))
      if storage.is_folder(path):
        self._labels = _label_by_folder(map(self._name, found))
    if not found:
      raise FileNotFoundError(
        f'no video files in {path}, looked for '
        f'{", ".join(sorted(VIDEO_EXTENSIONS))}, and for images'
      )
    self._files = manifests.Strings(map(os.fsencode, found))

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    file = self._files[index]
    label = NO_LABEL if self._labels is None else int(self._labels[index])
    return Record(file, label, self._name(file))

  def hash_names(self) -> str:
    # With the label, as half-done sets of shards have it written down.
    return hash_text(f'{self._name(file)} {NO_LABEL}' for file in self._files)

  def _name(self, file: str) -> str:
    name = file.removeprefix(self.path).lstrip(os.sep)
    return name or os.path.basename(file)


class ManifestSource(_Named):
  """The videos listed in a file: lines of text without a header, or a table.

  In text, path and label are separated by white space, a comma or `::`. The
  label is the last field, a whole number, and may be left out. Paths may
  contain spaces. Tables have a column `path` and, if there are labels, `label`.
  Paths are relative to the folder of the manifest unless absolute.
  """

  def __init__(self, path: str) -> None:
    self.path = path = os.fspath(path)
    labels = array.array('q')

    def read_paths():
      for video, label in manifests.read_manifest(path, _has_video_extension):
        labels.append(label)
        yield video

    self.paths = manifests.Strings(read_paths())
    self._labels = np.array(labels, np.int64)
    if not len(self):
      raise UserError(f'manifest {path} lists no videos')
    # A wrong folder is found at once; single missing files are for later.
    probed = range(0, len(self), -(-len(self) // _NUM_PROBED_PATHS))
    if not any(storage.exists(self[i].video) for i in probed):
      raise FileNotFoundError(
        f'manifest {self.path}: {self[0].video} does not exist, nor do '
        'others that were looked up; paths are relative to the folder of '
        'the manifest'
      )

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> Record:
    name = self.paths[index]
    video = name
    if not storage.is_remote(name):
      video = os.path.join(os.path.dirname(self.path), name)
    return Record(video, int(self._labels[index]), name)

  def hash_names(self) -> str:
    """Hashes the paths as they are written, and the labels."""
    return hash_text(map('{} {}'.format, self.paths, self._labels.tolist()))


class ArrayRecordSource(_Named):
  """The shards that `vjepa_jax.tools.prepare` writes."""

  _KIND: type = Record
  _REFUSAL = 'the shards hold features of vjepa_jax.tools.extract, not videos'

  def __init__(self, path: str, found: Sequence[str] | None = None) -> None:
    """Opens one shard, a glob or a folder, of which the shards may be given.

    Raises:
      FileNotFoundError: There is no such shard.
      UserError: A shard is damaged or holds something else, or some of a
        folder's or glob's shards are missing.
    """
    path = os.fspath(path)
    if found is None:
      found = _pick_shards(path, storage.list_files(path))
    if not found:
      raise FileNotFoundError(f'no ArrayRecord shards match {path}')
    if found != [path]:
      # A glob may choose some of the numbers.
      is_glob = glob.has_magic(path) and not storage.is_folder(path)
      check_complete(found, os.path.basename(path) if is_glob else '*')
    kind = RemoteShards if storage.is_remote(found[0]) else Shards
    self._records, self.path = kind(found), found[0]
    if not len(self):
      raise UserError(f'the shards {path} are empty')
    find_usable(self)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    try:
      record = unpack(self._records[index])
    except (RuntimeError, ValueError) as error:
      name = self._records.name(index)
      raise DecodeError(describe_error(error), name) from error
    if not isinstance(record, self._KIND):
      raise _OtherKindError(self._REFUSAL, self._records.name(index))
    return record

  def hash_names(self) -> str:
    """Hashes the names of the shards."""
    return hash_text(map(os.path.basename, self._records.paths))


class _OtherKindError(DecodeError):
  """A record that is no damaged one, but of another kind of shards."""


def find_usable(source: Source) -> Record | VideoFeatures:
  """Returns the first record that is not damaged, among the first hundred.

  Raises:
    UserError: There is none.
  """
  for index in range(min(len(source), 100)):
    try:
      return source[index]
    except DecodeError as error:
      damage = error
      if isinstance(error, _OtherKindError):
        break  # so are all, and records of videos are large
  raise UserError(f'{damage.name}: {damage}')


class TfdsSource(_Named):
  """A split of a TFDS data set, read without TensorFlow.

  The data set must have been prepared with `file_format='array_record'`. Its
  videos may be bytes of encoded files, paths, or uint8 [N, H, W, 3]; without a
  feature 'video' its images are taken.
  """

  def __init__(
    self,
    name: str,
    split: str,
    data_dir: str | None = None,
    video_key: str | None = None,
    label_key: str = 'label',
  ) -> None:
    self.path = f'{name}/{split}'
    self._arguments = name, split, data_dir
    if not len(self):
      raise UserError(f'TFDS {name}/{split} is empty')
    keys = self._examples.dataset_info.features.keys()
    if video_key is None:
      video_key = next((k for k in ('video', 'image') if k in keys), 'video')
    if video_key not in keys:
      raise UserError(
        f'TFDS {name} has no feature {video_key!r}, it has '
        f'{", ".join(sorted(keys))}: set video_key'
      )
    self._keys = video_key, label_key

  @functools.cached_property
  def _examples(self):
    import tensorflow_datasets as tfds

    name, split, data_dir = self._arguments
    examples = tfds.data_source(
      name, split=split, data_dir=data_dir, download=False
    )
    parts = examples.dataset_info.splits[split].file_instructions
    # Theirs keeps every shard open.
    examples.data_source = Shards(
      [part.filename for part in parts],
      [(part.skip, part.skip + part.take) for part in parts],
    )
    return examples

  def __getstate__(self) -> dict:
    return {k: v for k, v in self.__dict__.items() if k != '_examples'}

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> Record:
    video, label = self._keys
    name = f'{self.path}[{index}]'
    try:
      example = self._examples[index]
      frames = example[video]
      if isinstance(frames, np.ndarray) and frames.ndim == 3:  # an image
        frames = frames[None]
      return Record(frames, int(example.get(label, NO_LABEL)), name)
    except (OSError, IndexError):
      raise
    except Exception as error:  # What reads and parses has no common one.
      raise DecodeError(describe_error(error), name) from error

  def hash_names(self) -> str:
    """Hashes the name of the data set, with its version, and of the split."""
    return hash_text([self._examples.dataset_info.full_name, self.path])


class Subset(_Named):
  """Some of the records of a source, in the order of the indices."""

  def __init__(self, source: Source, indices: Sequence[int]) -> None:
    self._source, self.path = source, source.path
    self._indices = np.asarray(indices, np.int64)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Record:
    return self._source[int(self._indices[index])]

  def hash_names(self) -> str:
    return hash_text([self._source.hash_names(), str(self._indices.tolist())])


def hash_text(names: Iterable[str]) -> str:
  """Hashes names, in their order, to hexadecimal digits."""
  digest = hashlib.sha256()
  for name in names:
    digest.update(name.encode('utf-8', 'surrogateescape') + b'\n')
  return digest.hexdigest()


def _label_by_folder(names: Iterable[str]) -> np.ndarray | None:
  """Returns the place of each name's first folder, if all have one."""
  folders = [name.split(os.sep)[:-1][:1] for name in names]
  if not all(folders):
    return None
  return np.unique([folder for (folder,) in folders], return_inverse=True)[1]


def _has_video_extension(path: str) -> bool:
  return _has_extension(path, VIDEO_EXTENSIONS)


def _is_image(path: str) -> bool:
  return _has_extension(path, images.EXTENSIONS)


def _has_extension(path: str, extensions: frozenset[str]) -> bool:
  name = os.path.basename(path)
  # Archives unpacked from some systems are full of hidden '._name.mp4' files.
  return (
    not name.startswith('.') and manifests.get_extension(name) in extensions
  )


def _pick_shards(path: str, files: Iterable[str]) -> list[str]:
  """Picks the complete ArrayRecord shards.

  Args:
    path: A folder, whose shards lie in it and not below, a glob, or a shard.
    files: What `storage.list_files` says that it means.
  """
  folder = path.rstrip('/')
  return sorted(
    file
    for file in files
    if _SHARD_PATTERN.search(os.path.basename(file))
    and not file.endswith('.tmp')
    and (os.path.dirname(file) == folder or not file.startswith(f'{folder}/'))
  )
