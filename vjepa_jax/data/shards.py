"""Reads ArrayRecord shards, few open at a time, and writes them resumably.

A shard is there whole or not at all, so that an interrupted run goes on with
the shards that are missing. Which items belong into which shard depends on the
options alone, which are written down beside the shards and compared.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import fnmatch
import functools
import json
import os
import re
from typing import Any, NamedTuple

from absl import logging
import numpy as np
import tqdm

from vjepa_jax.data import storage
from vjepa_jax.errors import UserError
from vjepa_jax.progress import make_bar

# One record a chunk, so that reading one record reads nothing else; and no
# compression, which neither videos nor features gain from.
_WRITER_OPTIONS = 'group_size:1,uncompressed'
_SUFFIX = '.array_record'
# Each takes a file descriptor.
_MAX_OPEN = 64
_INDEX_THREADS = 16
_NUMBERED = re.compile(r'(.*)-(\d+)-of-(\d+)([^/]*)')


class BadFile(NamedTuple):
  """A video that was left out."""

  name: str
  reason: str


class Shards(Sequence[bytes]):
  """Random access to the records of many shards.

  Attributes:
    paths: Of the shards.
  """

  def __init__(
    self, paths: Sequence[str], spans: Sequence[tuple[int, int]] | None = None
  ) -> None:
    """Counts the records of each shard.

    Args:
      paths: Of the shards.
      spans: The first record of each and that after the last, where they are
        known and need not be all.

    Raises:
      FileNotFoundError: There is no such shard.
      UserError: A shard is damaged.
    """
    self.paths = list(paths)
    # They may have been written anew since they were last read.
    _open_shard.cache_clear()
    if spans is None:
      with futures.ThreadPoolExecutor(_INDEX_THREADS) as pool:
        spans = [(0, n) for n in pool.map(_count_records, self.paths)]
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
    self._ends = np.cumsum(stops - starts)
    # What brings the index of a record to its place in its shard.
    self._offsets = starts - (self._ends - (stops - starts))

  def __len__(self) -> int:
    return int(self._ends[-1]) if self.paths else 0

  def __getitem__(self, index: int) -> bytes:
    """Reads one record.

    Raises:
      RuntimeError: It is damaged.
      OSError: The shard is not there any more.
    """
    path, position = self._locate(index)
    return _open_shard(path).read([position])[0]

  def name(self, index: int) -> str:
    """Names a record by its shard and its place in it."""
    path, position = self._locate(index)
    return f'{os.path.basename(path)}[{position}]'

  def _locate(self, index: int) -> tuple[str, int]:
    index = range(len(self))[index]  # Negative numbers, and IndexError.
    shard = int(np.searchsorted(self._ends, index, side='right'))
    return self.paths[shard], index + int(self._offsets[shard])


# An evicted reader closes its file when the last thread that reads is done.
@functools.lru_cache(_MAX_OPEN)
def _open_shard(path: str) -> Any:
  """Opens a shard for reading.

  Raises:
    FileNotFoundError: There is no such file.
    OSError: Its index is damaged.
  """
  # Imported late: worker processes start sooner.
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(
    path, options='readahead_buffer_size:0', file_reader_buffer_size=2**15
  )
  if not reader.ok():
    if not storage.exists(path):
      raise FileNotFoundError(f'shard {path} does not exist')
    raise OSError(f'shard {path} is damaged or cut off, or not an ArrayRecord')
  return reader


def _count_records(path: str) -> int:
  """Counts the records of a shard, and leaves it closed."""
  try:
    return _open_shard.__wrapped__(path).num_records()
  except FileNotFoundError:
    raise
  except (OSError, RuntimeError) as error:
    raise UserError(f'cannot open the shards: {error}') from error


def check_complete(paths: Sequence[str], pattern: str = '*') -> None:
  """Raises UserError if one of the shards `...-00000-of-00002...` is missing.

  Args:
    paths: Of all shards that were found; others have no such number.
    pattern: Of the names of all that there should be.
  """
  found = collections.defaultdict(set)
  for stem, number, count, suffix in (
    match.groups() for match in map(_NUMBERED.fullmatch, paths) if match
  ):
    found[stem, count, suffix].add(int(number))
  for (stem, count, suffix), numbers in found.items():
    names = [
      f'{stem}-{number:0{len(count)}d}-of-{count}{suffix}'
      for number in sorted(set(range(int(count))) - numbers)
    ]
    missing = [
      name
      for name in names
      if fnmatch.fnmatchcase(os.path.basename(name), pattern)
    ]
    if missing:
      raise UserError(
        f'{len(missing)} of {int(count)} shards are missing, the first is '
        f'{missing[0]}: finish what wrote them by the same command'
      )


def name_shards(folder: str, stem: str, count: int) -> list[str]:
  """Returns the paths `FOLDER/STEM-00000-of-00002.array_record`, ..."""
  return [
    os.path.join(folder, f'{stem}-{i:05d}-of-{count:05d}{_SUFFIX}')
    for i in range(count)
  ]


def check_options(path: str, options: dict[str, Any]) -> None:
  """Writes down the options, or compares them with those of earlier runs.

  Args:
    path: JSON file beside the shards. Several hosts may do this at once.
    options: What the content of the shards depends on, JSON.

  Raises:
    UserError: Earlier shards were made with other options.
  """
  options = json.loads(json.dumps(options))
  if not storage.exists(path):
    storage.replace(path, json.dumps(options, indent=2))
    return
  earlier = json.loads(storage.read(path))
  changes = [
    f'{key} was {earlier.get(key)} and is now {value}'
    for key, value in options.items()
    if earlier.get(key) != value
  ]
  if changes:
    raise UserError(
      f'{os.path.dirname(path)} was begun with other options or videos: '
      f'{"; ".join(changes)}. Use another --output, or delete it'
    )


def find_missing(paths: Sequence[str]) -> list[int]:
  """Finds which shards, of one folder, are not there yet."""
  there = _list_names(paths)
  return [i for i, p in enumerate(paths) if os.path.basename(p) not in there]


def write_shards(
  paths: Sequence[str],
  ranges: Sequence[range],
  own: Sequence[int],
  convert: Callable[[list[range]], Iterable[Iterable[bytes | BadFile]]],
  bad_files: str,
) -> list[dict[str, Any]]:
  """Writes the shards that are not there yet, each atomically, in order.

  Whoever finds that all shards are there joins the lists of bad files, one a
  shard, to one file.

  Args:
    paths: Of all shards.
    ranges: Which items are in each.
    own: The shards that are for this machine to write.
    convert: From the ranges of the missing shards to an iterable for each, in
      order, of packed records or why there is none.
    bad_files: JSON lines file that lists all bad ones.

  Returns:
    The bad files of this machine's shards: 'name', 'reason' and 'shard'.
  """
  missing = sorted(set(find_missing(paths)).intersection(own))
  earlier = _read_earlier(bad_files, missing)
  if not missing:
    logging.info('Nothing to do: all %d shards are there.', len(own))
  elif len(missing) < len(own):
    kept = len(own) - len(missing)
    logging.info('Keeping %d of %d shards, complete.', kept, len(own))
  total = sum(len(ranges[i]) for i in own)
  with make_bar(
    total=total,
    initial=total - sum(len(ranges[i]) for i in missing),
    unit='video',
    smoothing=0.05,
    disable=not missing,
  ) as progress:
    converted = convert([ranges[i] for i in missing])
    for i, results in zip(missing, converted, strict=True):
      _write_shard(paths[i], i, results, progress)
  left = len(find_missing(paths))
  if not left:
    lines = _read_bad(paths, range(len(paths)), earlier)
    storage.replace(bad_files, ''.join(f'{json.dumps(x)}\n' for x in lines))
    _remove_unfinished(paths)
  elif len(own) > 1:
    logging.info('%d of %d shards are for other machines.', left, len(paths))
  return _read_bad(paths, own, earlier)


def _list_names(paths: Sequence[str]) -> set[str]:
  """Lists the names of the files in the folder of some shards."""
  folder = os.path.dirname(paths[0])
  try:
    files = storage.list_files(folder)
  except FileNotFoundError:
    return set()  # A remote folder is there when something is in it.
  # Folders in it may hold other shards of the same names.
  return {os.path.basename(f) for f in files if os.path.dirname(f) == folder}


def _remove_unfinished(paths: Sequence[str]) -> None:
  """Removes what machines that were killed had begun."""
  shards = set(map(os.path.basename, paths))
  for name in _list_names(paths):
    shard, suffix, rest = name.partition(_SUFFIX)
    if shard + suffix in shards and rest.endswith('.tmp'):
      storage.remove(os.path.join(os.path.dirname(paths[0]), name))


def _name_bad(path: str) -> str:
  """Names the list of the bad files of a shard."""
  return f'{path.removesuffix(_SUFFIX)}.bad.jsonl'


def _read_bad(
  paths: Sequence[str],
  numbers: Sequence[int],
  earlier: dict[int, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
  """Reads the lists of shards; of one without, what was known earlier."""
  there = _list_names(paths)
  lines = []
  for i in numbers:
    path = _name_bad(paths[i])
    if os.path.basename(path) in there:
      own = map(json.loads, storage.read(path).splitlines())
      lines += [{**line, 'shard': i} for line in own]
    else:
      lines += earlier.get(i, [])
  return lines


def _read_earlier(
  bad_files: str, missing: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
  """Reads the list of all bad files, but of shards that are written anew.

  Sets exist whose shards have no lists of their own.
  """
  earlier = collections.defaultdict(list)
  if storage.exists(bad_files):
    for line in storage.read(bad_files).splitlines():
      # Whoever was killed may have left half a line.
      entry = json.loads(line) if line.endswith(b'}') else {}
      if entry and entry['shard'] not in missing:
        earlier[entry['shard']].append(entry)
  return earlier


def _write_shard(
  path: str,
  number: int,
  results: Iterable[bytes | BadFile],
  progress: tqdm.tqdm,
) -> None:
  """Writes one shard, atomically, and before it the list of its bad files."""
  # Imported late: worker processes start sooner.
  from array_record.python import array_record_module

  with storage.replacing(path) as temporary:
    writer = array_record_module.ArrayRecordWriter(temporary, _WRITER_OPTIONS)
    bad = []
    for result in results:
      if isinstance(result, BadFile):
        bad.append(result)
        progress.write(f'left out {result.name}: {result.reason}')
      else:
        writer.write(result)
      progress.update()
    writer.close()
    lines = [json.dumps(b._asdict()) + '\n' for b in bad]
    if bad:
      storage.replace(_name_bad(path), ''.join(lines))
    else:
      # An earlier attempt may have listed some.
      storage.remove(_name_bad(path))


def map_ahead(
  pool: futures.Executor,
  function: Callable[[Any], Any],
  items: Iterable[Any],
  ahead: int,
) -> Iterator[Any]:
  """Maps items in a pool, in order and at most so many ahead of the reader.

  Without the bound, finished results would fill the memory.
  """
  queue = collections.deque()
  try:
    for item in items:
      queue.append(pool.submit(function, item))
      if len(queue) > ahead:
        yield queue.popleft().result()
    while queue:
      yield queue.popleft().result()
  finally:
    for future in queue:
      future.cancel()
