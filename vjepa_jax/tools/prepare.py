r"""Packs videos into ArrayRecord shards, re-encoded for fast reading or as is.

Example:

  python -m vjepa_jax.tools.prepare --input=videos/ --output=shards/ \
      --short_side=256 --fps=7.5 --gop=8

With any of --short_side, --fps and --gop, each video is decoded once from its
start, resized (never enlarged), resampled by presentation time and encoded as
H.264 that is cheap to decode and has a keyframe every --gop frames. Sampling
such a data set at its own rate is what frame_step=4 is on 30 fps originals.
Without them the files are stored unchanged, once they are seen to open.

An interrupted run is continued by the same command. Several machines share the
work if each is given --host_index and --num_hosts. The tasks of a SLURM array
know both, and the pods of an indexed Kubernetes job the first:

  sbatch --array=0-31 --wrap='python -m vjepa_jax.tools.prepare ... \
      --num_hosts=auto'

--engine=beam hands a shard at a time to Apache Beam instead (pip install -e
'.[beam]'), by default on the cores of this machine. The shards are the same to
the byte. Files that cannot be used are listed with the reason beside their
shard, and once all shards are there in OUTPUT/bad_files.jsonl.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import fractions
import functools
import io
import itertools
import math
import multiprocessing
import os
from types import SimpleNamespace
from typing import NamedTuple

from absl import logging
import av
import cv2
import numpy as np

from vjepa_jax.data import decode, readers, shards, sources, storage
from vjepa_jax.data.encode import write_frames
from vjepa_jax.data.records import Record, pack
from vjepa_jax.data.shards import BadFile
from vjepa_jax.tools import command, engine

_CRF = 23
# Why a file is left out, and how many in a row are for one and the same reason,
# which is not in the files.
_KILLS = 'kills its reader'
_MAX_KILLERS = 5
# Timestamps of videos that keep their own frame times.
_TICKS_PER_SECOND = 90_000


class Encoding(NamedTuple):
  """How to re-encode: short side in pixels or None, fps or None, and GOP."""

  short_side: int | None
  fps: float | None
  gop: int


def prepare(
  source: sources.Source,
  output: str,
  encoding: Encoding | None,
  *,
  shard_size: int,
  num_workers: int,
  host_index: int = 0,
  num_hosts: int = 1,
) -> None:
  """Writes the shards of `source` that the folder `output` does not hold yet.

  Args:
    source: Videos.
    output: Folder, created if needed.
    encoding: How to re-encode, None to copy.
    shard_size: Videos in a shard, those left out included.
    num_workers: Processes; 0 for none.
    host_index, num_hosts: Which of the hosts that share the work this is.

  Raises:
    RuntimeError: Worker processes die of something else than a video.
    ValueError: The shards were begun with other options.
  """
  _, write = start(source, output, encoding, shard_size, num_workers)
  write(host_index, num_hosts)


def start(
  source: sources.Source,
  output: str,
  encoding: Encoding | None,
  shard_size: int,
  num_workers: int,
) -> engine.Work:
  """Checks the arguments, those of `prepare`; returns what writes shards.

  Raises:
    ValueError: The shards were begun with other options.
  """
  storage.make_folder(output)
  options = {
    'num_videos': len(source),
    'videos_sha256': source.hash_names(),
    'shard_size': shard_size,
    'encoding': encoding._asdict() if encoding else 'as is',
  }
  shards.check_options(os.path.join(output, 'prepare.json'), options)
  items = range(len(source))
  ranges = [items[i : i + shard_size] for i in items[::shard_size]]
  paths = shards.name_shards(output, 'videos', len(ranges))

  def convert_shards(missing):
    records = (_read(source, i) for part in missing for i in part)
    results = _convert_all(records, encoding, num_workers)
    results = _doubt_killers(results)
    return (itertools.islice(results, len(r)) for r in missing)

  def write(host_index, num_hosts):
    own = range(host_index, len(ranges), num_hosts)
    bad_files = os.path.join(output, 'bad_files.jsonl')
    bad = shards.write_shards(paths, ranges, own, convert_shards, bad_files)
    with concurrent.futures.ThreadPoolExecutor() as threads:
      size = sum(threads.map(storage.measure, [paths[i] for i in own]))
    logging.info(
      'Wrote %d videos to %d shards in %s, %.1f MB in all.',
      sum(len(ranges[i]) for i in own) - len(bad),
      len(own),
      output,
      size / 1e6,
    )
    if bad:
      if num_hosts > 1:
        bad_files = os.path.join(output, '*.bad.jsonl')
      logging.warning('Left out %d files, see %s.', len(bad), bad_files)

  return paths, write


def _read(source: sources.Source, index: int) -> Record | BadFile:
  """Reads a record of a source, or says why it cannot."""
  try:
    return source[index]
  except decode.DecodeError as error:
    return BadFile(error.name, str(error))


def _convert_all(
  records: Iterable[Record | BadFile],
  encoding: Encoding | None,
  num_workers: int,
) -> Iterator[bytes | BadFile]:
  """Yields what `convert` makes of each record, in order."""
  function = functools.partial(convert, encoding=encoding)
  if not num_workers:
    yield from map(function, records)
    return
  pending = collections.deque()  # what was taken and not yielded

  def take(record):
    pending.append(record)
    return record

  taken = map(take, records)
  while True:
    try:
      with _open_pool(num_workers) as pool:
        for result in shards.map_ahead(pool, function, taken, 2 * num_workers):
          pending.popleft()
          yield result
      return
    except BrokenProcessPool:
      logging.warning('a worker died, its videos are tried one by one')
    yield from _convert_singly(function, pending)


def _convert_singly(
  function: Callable[[Record | BadFile], bytes | BadFile],
  pending: collections.deque[Record | BadFile],
) -> Iterator[bytes | BadFile]:
  """Maps one record at a time, so that it shows which kill their process.

  Raises:
    RuntimeError: Processes die of something else.
  """
  ends = []  # of the processes that died of the first one pending
  while pending:
    with _open_pool(1) as pool:
      process = _find_process(pool)
      try:
        while pending:
          result = pool.submit(function, pending[0]).result()
          pending.popleft()
          ends.clear()
          yield result
        return
      except BrokenProcessPool:
        pass
    ends.append(process.exitcode)
    end = readers.describe_end(process.exitcode)
    if readers.is_to_blame(ends):
      yield BadFile(pending.popleft().name, f'{_KILLS}: {end}')
      ends.clear()
    elif len(ends) == readers.MAX_TRIES:
      raise RuntimeError(
        f'worker processes end by themselves, the last one: {end}'
      )


def _find_process(
  pool: concurrent.futures.Executor,
) -> multiprocessing.process.BaseProcess:
  """Has the only process of a pool do nothing, and returns it.

  Raises:
    RuntimeError: It cannot do even that.
  """
  try:
    number = pool.submit(os.getpid).result()
  except BrokenProcessPool as error:
    raise RuntimeError(
      'no worker process can be started: is there memory for one, and does a '
      "script do nothing when it is imported (if __name__ == '__main__')?"
    ) from error
  children = multiprocessing.active_children()
  return next(child for child in children if child.pid == number)


def _doubt_killers(
  results: Iterable[bytes | BadFile],
) -> Iterator[bytes | BadFile]:
  """Passes results on, unless many in a row are said to kill their process.

  Raises:
    RuntimeError: They are.
  """
  count = 0
  for result in results:
    kills = isinstance(result, BadFile) and result.reason.startswith(_KILLS)
    count = count + 1 if kills else 0
    if count == _MAX_KILLERS:
      raise RuntimeError(
        f'{count} files in a row, the last {result.name}, seem to kill their '
        f'reader ({result.reason}): something else must be wrong'
      )
    yield result


def _open_pool(num_workers: int) -> concurrent.futures.Executor:
  return concurrent.futures.ProcessPoolExecutor(
    num_workers,
    multiprocessing.get_context('spawn'),
    initializer=readers.start_reader,
    initargs=(math.inf,),
  )


def convert(
  record: Record | BadFile, encoding: Encoding | None
) -> bytes | BadFile:
  """Packs a video as it is in a shard, or says why there is none."""
  if isinstance(record, BadFile):
    return record
  try:
    # A file may be of any size, here and only here.
    limits = decode.Limits(gib=math.inf)
    with decode.open_video(record.video, limits) as video:
      if encoding is not None:
        content = transcode(video, encoding)
      elif isinstance(record.video, str):
        content = storage.read(record.video)
      else:
        content = record.video
  except storage.StorageError:
    raise  # no fault of the video
  except (decode.DecodeError, av.FFmpegError, OSError) as e:
    return BadFile(record.name, ' '.join(str(e).split()))
  return pack(record._replace(video=content))


def transcode(video: decode.Video, encoding: Encoding) -> bytes:
  """Re-encodes a video as an MP4 file of 8-bit 4:2:0 H.264.

  Returns:
    The bytes of the file. They depend on nothing but the arguments.

  Raises:
    DecodeError: if the video does not decode.
  """
  sides = video.height, video.width
  scale = min(1.0, (encoding.short_side or np.inf) / min(sides))
  # Even, for 4:2:0.
  size = tuple(max(2 * round(n * scale / 2), 2) for n in sides)
  if encoding.fps is None:
    times = video.times
    rate = fractions.Fraction(video.fps).limit_denominator(1001)
    base = fractions.Fraction(1, _TICKS_PER_SECOND)
    ticks = np.round(times * _TICKS_PER_SECOND).astype(int).tolist()
  else:
    duration = video.times[-1] + 1 / video.fps
    # The subtraction keeps a rounded duration from adding a frame.
    ticks = range(max(int(np.ceil(duration * encoding.fps - 0.01)), 1))
    times = np.array(ticks) / encoding.fps
    rate = fractions.Fraction(encoding.fps).limit_denominator(1001)
    base = 1 / rate
  file = io.BytesIO()
  # mbtree reads memory that x264 has not written when it comes to the edges of
  # B-frames, so the same frames could give other bytes.
  options = {
    'crf': str(_CRF),
    'g': str(encoding.gop),
    'tune': 'fastdecode',
    'x264-params': 'mbtree=0',
  }
  # Shrunk by averages: aliasing would stay in the data.
  frames = (
    cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
    for pixels in video.play(times)
  )
  with av.open(file, 'w', format='mp4') as container:
    write_frames(container, frames, size, rate, options, (ticks, base))
  return file.getvalue()


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('input', 'Folder, glob or manifest of videos.', required=True)
  define.string('output', 'Folder for the shards.', required=True)
  define.integer('short_side', 'Short side of the frames in pixels.', least=16)
  define.float('fps', 'Frames per second to resample to.', least=0.01)
  define.integer('gop', 'Frames between keyframes (8 if re-encoding).', least=1)
  define.integer('shard_size', 'Videos in a shard.', 256, least=1)
  define.integer('num_workers', 'Processes; 0 works in this one.', 2, least=0)
  engine.add_flags(define)


def begin(options: SimpleNamespace) -> engine.Work:
  """Begins what the flags say."""
  encoding = Encoding(options.short_side, options.fps, options.gop or 8)
  reencodes = {options.short_side, options.fps, options.gop} != {None}
  return start(
    sources.open_source(options.input),
    options.output,
    encoding if reencodes else None,
    options.shard_size,
    options.num_workers,
  )


def main(options: SimpleNamespace) -> None:
  """Has the shards written by this machine, or through Beam."""
  engine.spread('prepare', options)


if __name__ == '__main__':
  command.run(main, define_flags)
