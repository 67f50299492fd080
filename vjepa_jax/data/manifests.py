"""Reads manifests: files that list videos and their labels."""

import array
import codecs
from collections.abc import Callable, Iterable, Iterator
import io
import os

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.records import NO_LABEL
from vjepa_jax.errors import UserError

TABLE_EXTENSIONS = frozenset(['.jsonl', '.parquet'])
EXTENSIONS = TABLE_EXTENSIONS | {'.csv', '.txt', '.tsv', '.manifest'}


def read_manifest(
  path: str, is_video: Callable[[str], bool]
) -> Iterator[tuple[bytes, int]]:
  """Yields paths and labels one by one, which of millions takes little memory.

  Args:
    path: A table, or a text file.
    is_video: Whether what has no label is the path of a video.

  Raises:
    FileNotFoundError: There is no such file.
    UserError: It is malformed; the error says where.
  """
  try:
    content = storage.read(path)
  except FileNotFoundError as e:
    raise FileNotFoundError(f'manifest {path} does not exist') from e
  if get_extension(path) in TABLE_EXTENSIONS:
    return _read_table(path, content)
  return _read_lines(path, content, is_video)


def get_extension(path: str) -> str:
  """Returns the extension of a path in lower case."""
  return os.path.splitext(path)[1].lower()


def _read_table(path: str, content: bytes) -> Iterator[tuple[bytes, int]]:
  """Reads the columns `path` and, if there is one, `label`."""
  # Imported late: worker processes start sooner.
  import pyarrow as pa
  from pyarrow import json, parquet

  try:
    if get_extension(path) == '.jsonl':
      table = json.read_json(pa.BufferReader(content))
    else:
      table = parquet.read_table(pa.BufferReader(content))
  except pa.ArrowException as e:
    raise UserError(f'manifest {path} is damaged: {e}') from e
  if 'path' not in table.column_names:
    raise UserError(
      f'manifest {path} has no column path, only '
      f'{", ".join(table.column_names) or "none"}'
    )
  if 'label' not in table.column_names:
    labels = pa.repeat(NO_LABEL, len(table))
    table = table.append_column('label', labels)
  number = 0
  for batch in table.select(['path', 'label']).to_batches():
    for video, label in zip(*(c.to_pylist() for c in batch), strict=True):
      number += 1
      if not isinstance(video, str) or not isinstance(label, int):
        raise UserError(
          f'{path}, row {number}: {video!r} and {label!r} are no path and no '
          'whole number as its label'
        )
      yield os.fsencode(video), label


def _read_lines(
  path: str, content: bytes, is_video: Callable[[str], bool]
) -> Iterator[tuple[bytes, int]]:
  """Reads lines of a path and a label; blank ones are left out."""
  text = content.removeprefix(codecs.BOM_UTF8)
  for number, line in enumerate(io.BytesIO(text), 1):
    line = line.strip()
    if not line:
      continue
    try:
      line.decode()
      yield _parse_line(line, is_video)
    except UnicodeDecodeError as e:
      raise UserError(f'manifest {path} is not UTF-8 text: {e}') from e
    except ValueError as e:
      raise UserError(f'{path}, line {number}: {e}') from e


def _parse_line(
  line: bytes, is_video: Callable[[str], bool]
) -> tuple[bytes, int]:
  """Splits a stripped line into path and label.

  Raises:
    UserError: if the line does not end in a whole number and is not the path
      of a video either.
  """
  # Without patterns, which take several times as long.
  rest = line.rstrip(b'0123456789')
  sign = rest.endswith(b'-')
  number = len(rest) - sign
  path = line[:number].rstrip()
  for separator in (b'::', b','):
    if path.endswith(separator):
      path = path.removesuffix(separator).rstrip()
      break
  is_divided = len(path) < number and len(rest) < len(line)
  path = path.strip(b'"')
  if path and is_divided:
    return path, int(line[number:])
  path = line.strip(b'"')
  if not is_video(os.fsdecode(path)):
    raise UserError(
      f'{line.decode()!r} is neither the path of a video nor a path and a '
      'whole number as its label (a header line is not allowed)'
    )
  return path, NO_LABEL


class Strings:
  """A list of strings in one block of memory, cheap to hold and to pickle."""

  def __init__(self, strings: Iterable[bytes]) -> None:
    block, ends = bytearray(), array.array('q')
    for string in strings:
      block += string
      ends.append(len(block))
    self._block, self._ends = bytes(block), np.array(ends, np.int64)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> str:
    index = range(len(self))[index]  # Negative numbers, and IndexError.
    begin = int(self._ends[index - 1]) if index else 0
    # File names that are not UTF-8 must survive the round trip.
    return os.fsdecode(self._block[begin : int(self._ends[index])])
