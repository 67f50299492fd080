"""Features of a frozen encoder, from videos into shards."""

from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data import decode, readers, shards, sources, storage
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.records import VideoFeatures, pack
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation import batching
from vjepa_jax.evaluation.reading import Reader, open_reader
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.training.state import hash_params

_OPTIONS_FILE = 'extract.json'
_VIDEOS_PER_SHARD = 256


def extract(
  *arguments, host_index: int = 0, num_hosts: int = 1, **options
) -> tuple[int, int]:
  """Starts with the arguments of `start`, and writes a host's shards."""
  _, write = start(*arguments, **options)
  return write(host_index, num_hosts)


def start(
  source: sources.Source,
  output: str,
  encoder: Encoder,
  params: Any,
  options: ClipOptions,
  *,
  pool: str = 'none',
  dtype: str = 'float16',
  batch_size: int = 32,
  num_shards: int | None = None,
  num_threads: int | None = None,
) -> tuple[list[str], Callable[[int, int], tuple[int, int]]]:
  """Checks the options, and returns what writes shards of features.

  Args:
    source: Videos.
    output: Folder, created if needed; for several hosts a shared one. Shards
      that it holds are kept.
    encoder: The backbone; computes in its own dtype.
    params: Its parameters.
    options: How clips are cut; `num_clips` of each video.
    pool: 'none' keeps all tokens, 'mean' their mean.
    dtype: Of the features in the shards.
    batch_size: Clips encoded at a time, over all devices of this host.
    num_shards: Number of shards, over all hosts; default one for 256 videos.
    num_threads: Decoding threads; default as many as there are cores.

  Returns:
    The paths of all shards; and a function that writes those of host `index` of
    `count` and returns how many videos these have, and how many of them were
    left out. It raises ValueError if none can be read.

  Raises:
    UserError: The options do not fit together or to earlier ones.
  """
  num_shards = num_shards or -(-len(source) // _VIDEOS_PER_SHARD)
  paths = shards.name_shards(output, 'features', num_shards)
  _check_counts(len(source), num_shards, 0, 1)
  mesh = mesh_lib.make_mesh(1, jax.local_devices())
  apply = batching.apply_encoder(encoder, pool=pool == 'mean', dtype=dtype)
  map_batches = batching.make_map_batches(
    apply, mesh, batch_size, '--batch_size'
  )
  placed = jax.device_put(params, sharding.replicate(mesh))

  def encode(batches):
    return map(batching.fetch, map_batches(placed, batches))

  storage.make_folder(output)
  shards.check_options(
    os.path.join(output, _OPTIONS_FILE),
    _describe(source, encoder, params, options)
    | {'num_shards': num_shards, 'pool': pool, 'dtype': dtype},
  )
  bounds = [len(source) * i // num_shards for i in range(num_shards + 1)]
  ranges = [range(*pair) for pair in itertools.pairwise(bounds)]
  bad_files = os.path.join(output, 'quarantine.jsonl')
  num_threads = num_threads or len(os.sched_getaffinity(0))

  def write(index, count):
    _check_counts(len(source), num_shards, index, count)
    own = range(index, num_shards, count)
    journal = readers.open_journal(output, index)
    with open_reader(source, options, journal) as reader:
      convert = functools.partial(
        _convert, reader, encode, batch_size, num_threads
      )
      bad = shards.write_shards(paths, ranges, own, convert, bad_files)
    num_videos = sum(len(ranges[i]) for i in own)
    if len(bad) == num_videos:
      raise UserError(
        f'none of {num_videos} videos could be read, the last one '
        f'{bad[-1]["name"]}: {bad[-1]["reason"]}'
      )
    return num_videos, len(bad)

  return paths, write


def _check_counts(num_videos, num_shards, host_index, num_hosts):
  """Raises UserError where a host or a shard would have nothing."""
  if not 0 <= host_index < num_hosts:
    raise UserError(
      f'--host_index={host_index} is not one of --num_hosts={num_hosts}, '
      'which count from 0'
    )
  if not num_hosts <= num_shards <= num_videos:
    raise UserError(
      f'{num_shards} shards of {num_videos} videos for {num_hosts} hosts: '
      'every host needs a shard and every shard a video, change --shards'
    )


def _convert(
  reader: Reader,
  encode: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]],
  batch_size: int,
  num_threads: int,
  missing: list[range],
) -> Iterator[Iterator[bytes | shards.BadFile]]:
  """Yields for each of the missing shards its records.

  Decoding goes on across the borders of shards; batches do not, so that the
  bytes of a shard do not depend on what was written before it.
  """
  read = functools.partial(_read, reader)
  indices = itertools.chain.from_iterable(missing)
  ahead = max(2 * num_threads, 2 * batch_size // reader.options.num_clips)
  with futures.ThreadPoolExecutor(num_threads) as threads:
    decoded = shards.map_ahead(threads, read, indices, ahead)
    for part in missing:
      videos = itertools.islice(decoded, len(part))
      yield _encode_shard(videos, encode, batch_size)


def _read(
  reader: Reader, index: int
) -> tuple[VideoFeatures, np.ndarray] | shards.BadFile:
  """Decodes the clips of one video, or says why it cannot.

  Returns:
    The record that is to be written, its features empty yet; and the clips,
    uint8 `[segments, frames, size, size, 3]`.
  """
  try:
    record = reader.source[index]
    clips, times = reader.cut(record, index)
  except decode.DecodeError as error:
    return shards.BadFile(error.name or record.name, str(error))
  empty, ends = np.zeros(0), times[:, [0, -1]]
  return VideoFeatures(empty, record.label, record.name, index, ends), clips


def _encode_shard(
  decoded: Iterable[tuple[VideoFeatures, np.ndarray] | shards.BadFile],
  encode: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]],
  batch_size: int,
) -> Iterator[bytes | shards.BadFile]:
  """Turns the decoded videos of a shard into its records, in their order."""
  decoded, ahead = itertools.tee(decoded)
  good = (video for video in ahead if not isinstance(video, shards.BadFile))
  clips = itertools.chain.from_iterable(clips for _, clips in good)

  def cut():
    while batch := list(itertools.islice(clips, batch_size)):
      yield np.stack(batch)

  features = itertools.chain.from_iterable(encode(cut()))
  for video in decoded:
    if isinstance(video, shards.BadFile):
      yield video
      continue
    record, own = video
    values = np.stack(list(itertools.islice(features, len(own))))
    if not np.isfinite(values).all():
      raise UserError(
        f'features of {record.name} are not finite in {values.dtype}: use '
        '--dtype=float32, or another checkpoint if they still are not'
      )
    yield pack(record._replace(features=values))


def _describe(source, encoder, params, options: ClipOptions) -> dict[str, Any]:
  """Says what the features depend on."""
  names = ('width', 'depth', 'num_heads', 'tubelet', 'positions', 'pixel_norm')
  fields = {name: getattr(encoder, name) for name in names}
  clip = ('frames', 'resolution', 'frame_step', 'fps', 'num_clips')
  return {
    'num_videos': len(source),
    'videos_sha256': source.hash_names(),
    'encoder': fields | {'dtype': jnp.dtype(encoder.dtype).name},
    'params_sha256': hash_params(params),
    **{name: getattr(options, name) for name in clip},
  }
