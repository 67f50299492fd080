"""Reads ArrayRecord shards of remote storage, each record by itself.

ArrayRecord's own reader opens local files alone, and a copy of a whole shard is
much to wait for where one video of it is wanted. What `shards` writes is plain:
a Riegeli file of one uncompressed chunk a record, with the places of the chunks
in a footer, and of that in the last block.

https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
https://github.com/google/array_record/blob/main/cpp/layout.proto
"""

from collections.abc import Sequence
from concurrent import futures
import struct

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.shards import Shards
from vjepa_jax.errors import UserError

_BLOCK = 1 << 16
_BLOCK_HEADER = 24
# Hash, size and hash of the data, kind and number of records, decoded size.
_CHUNK_HEADER = struct.Struct('<8xQ8xQQ')
_MAGIC = 0x71930E704FDAE05E
_SIMPLE, _UNCOMPRESSED = ord('r'), 0
# More than the footer and the last block of most shards take.
_TAIL = 4 * _BLOCK
_THREADS = 32


class RemoteShards(Shards):
  """Random access to the records of many remote shards."""

  def __init__(self, paths: Sequence[str]) -> None:
    """Reads where the records are.

    Raises:
      FileNotFoundError: There is no such shard.
      UserError: A shard is damaged, or of another form.
    """
    with futures.ThreadPoolExecutor(_THREADS) as threads:
      bounds = list(threads.map(_read_bounds, paths))
    super().__init__(paths, [(0, len(b) - 1) for b in bounds])
    self._bounds = dict(zip(paths, bounds, strict=True))

  def __getitem__(self, index: int) -> bytes:
    """Reads one record.

    Raises:
      UserError: It is damaged.
      FileNotFoundError: The shard is not there any more.
      StorageError: The storage does not answer.
    """
    path, position = self._locate(index)
    start, end = self._bounds[path][position : position + 2].tolist()
    content = storage.read_range(path, start, end)
    try:
      return _read_chunk(content, start)[1]
    except (IndexError, ValueError, struct.error) as error:
      raise UserError('the record is damaged') from error


def _read_bounds(path: str) -> np.ndarray:
  """Reads where the records of a shard start, and where the last one ends."""
  try:
    size = storage.measure(path)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'shard {path} does not exist') from error
  begin = max(0, (size - _TAIL) // _BLOCK * _BLOCK)
  tail = storage.read_range(path, begin, size)
  try:
    # The same message three times: number of a field, value, number, value.
    last = size - _BLOCK
    sizes, content = _read_chunk(tail[last - begin :], last)
    _, footer, _, magic = _read_numbers(content[: sizes[0]]).tolist()
    if magic != _MAGIC or footer > last:
      raise UserError('not the last block')
    if footer < begin:
      begin, tail = footer, storage.read_range(path, footer, last)
    # A message of another form, and one for each chunk: three numbered fields,
    # which are its place, its size and how many records it has.
    sizes, content = _read_chunk(tail[footer - begin : last - begin], footer)
    chunks = _read_numbers(content[sizes[0] :]).reshape(len(sizes) - 1, 6)
    if (chunks[:, 5] != 1).any():
      raise UserError('more than one record in a chunk')
  except (IndexError, ValueError, struct.error) as error:
    raise UserError(
      f'{path} is damaged, or no shard of vjepa_jax.tools.prepare or extract'
    ) from error
  return np.append(chunks[:, 1], footer).astype(np.int64)


def _read_chunk(data: bytes, position: int) -> tuple[list[int], bytes]:
  """Reads the uncompressed chunk at the start of `data`.

  Args:
    data: The chunk and, maybe, more.
    position: Of `data` in the file.

  Returns:
    The sizes of its records, and the records, one after the other.

  Raises:
    IndexError, ValueError, struct.error: It is no such chunk.
  """
  data = _drop_block_headers(data, position)
  size, kind, decoded_size = _CHUNK_HEADER.unpack_from(data)
  content = data[_CHUNK_HEADER.size : _CHUNK_HEADER.size + size]
  if kind & 0xFF != _SIMPLE or content[0] != _UNCOMPRESSED:
    raise UserError('not an uncompressed chunk')
  # How many bytes the sizes take, the sizes, the records.
  start = size - decoded_size
  length, *sizes = _read_numbers(content[1:start]).tolist()
  if (len(content), len(sizes), sum(sizes)) != (size, kind >> 8, decoded_size):
    raise UserError('sizes do not add up')
  return sizes, content[start:]


def _drop_block_headers(data: bytes, position: int) -> bytes:
  """Takes out what is at every multiple of the size of a block."""
  parts, at = [], 0
  while at < len(data):
    offset = (position + at) % _BLOCK
    skipped = max(0, _BLOCK_HEADER - offset)
    parts.append(data[at + skipped : at + _BLOCK - offset])
    at += _BLOCK - offset
  return b''.join(parts)


def _read_numbers(data: bytes) -> np.ndarray:
  """Reads the numbers of variable length that `data` consists of, uint64."""
  # Seven bits a byte, the lowest first; the last one of a number is below 128.
  values = np.frombuffer(data, np.uint8)
  if not len(values):
    return np.empty(0, np.uint64)
  starts = np.flatnonzero(np.append(True, values[:-1] < 0x80))
  lengths = np.diff(np.append(starts, len(values)))
  shifts = 7 * (np.arange(len(values)) - np.repeat(starts, lengths))
  bits = (values & 0x7F).astype(np.uint64) << shifts.astype(np.uint64)
  return np.add.reduceat(bits, starts)
