r"""Writes episodes of robots to ArrayRecord shards, as small films or features.

python -m vjepa_jax.tools.prepare_episodes --input=droid/train.csv \
  --output=droid/shards --resolution=256
python -m vjepa_jax.tools.prepare_episodes --input=droid/train.csv \
  --output=droid/features --resolution=256 --backbone=vitg.pt

--input is whatever configs/action.py reads (docs/data.md), and so is the
result. Frames are cut as in training, once. With a --backbone they are encoded,
each alone: training is then of the predictor alone, with the same --backbone.
An interrupted run is continued by the same command; several machines and Apache
Beam share the work as vjepa_jax.tools.prepare says. Episodes that cannot be
read are listed in OUTPUT/quarantine.jsonl.
"""

from collections.abc import Callable
from concurrent import futures
import functools
import io
import itertools
import os
from types import SimpleNamespace
from typing import Any

import av
import numpy as np

from vjepa_jax.data import shards, storage, trajectories
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.encode import write_frames
from vjepa_jax.data.records import Episode, pack
from vjepa_jax.data.video import DecodeError
from vjepa_jax.errors import UserError
from vjepa_jax.tools import command, engine

_EPISODES_PER_SHARD = 64
_X264 = {'preset': 'veryfast', 'crf': '18', 'x264-params': 'mbtree=0:threads=1'}


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('input', 'Episodes.', required=True)
  define.string('camera', 'Of several.', '')
  define.string('output', 'Folder for the shards.', required=True)
  define.integer('resolution', 'Of a frame, pixels.', 256, least=1)
  define.float('fps', 'Rows a second that are kept; all of them.')
  define.string('backbone', 'Whatever vjepa_jax.load takes; none for films.')
  define.string('which', 'Or encoder.', 'target_encoder')
  define.integer('batch_size', 'Frames encoded at a time.', 32, least=1)
  define.integer('shards', 'Number of shards; one for 64 episodes.', least=1)
  define.integer('num_threads', 'Decoding threads.', 2, least=1)
  engine.add_flags(define)


def begin(options: SimpleNamespace) -> engine.Work:
  """Begins what the flags say."""
  source = trajectories.open_trajectories(options.input, options.camera)
  trajectories.check_source(
    source, lambda episode: trajectories.check_episode(episode, 'plain')
  )
  count = options.shards or -(-len(source) // _EPISODES_PER_SHARD)
  if count > len(source):
    raise UserError(f'--shards={count} of {len(source)} episodes')
  paths = shards.name_shards(options.output, 'episodes', count)
  finish, described = _film, {}
  if options.backbone:
    finish, described = _make_encode(options)
  storage.make_folder(options.output)
  shards.check_options(
    os.path.join(options.output, trajectories.PREPARED),
    {
      'num_episodes': len(source),
      'names_sha256': source.hash_names(),
      'num_shards': count,
      **{name: getattr(options, name) for name in ('resolution', 'fps')},
      **described,
    },
  )
  bounds = [len(source) * i // count for i in range(count + 1)]
  ranges = [range(*pair) for pair in itertools.pairwise(bounds)]
  read = functools.partial(
    _read, source, ClipOptions(resolution=options.resolution), options.fps
  )

  def convert(missing):
    with futures.ThreadPoolExecutor(options.num_threads) as threads:
      indices = itertools.chain.from_iterable(missing)
      ahead = 2 * options.num_threads
      episodes = shards.map_ahead(threads, read, indices, ahead)
      for part in missing:
        own = itertools.islice(episodes, len(part))
        yield (
          x if isinstance(x, shards.BadFile) else pack(finish(x)) for x in own
        )

  def write(host_index, num_hosts):
    own = range(host_index, count, num_hosts)
    bad_files = os.path.join(options.output, 'quarantine.jsonl')
    bad = shards.write_shards(paths, ranges, own, convert, bad_files)
    total = sum(len(ranges[i]) for i in own)
    print(f'{total - len(bad)} episodes are in {options.output}')
    if bad:
      print(f'left out {len(bad)}, listed in {bad_files}')

  return paths, write


def _read(
  source: Any, options: ClipOptions, fps: float | None, index: int
) -> Episode | shards.BadFile:
  """Reads an episode, its video the frames uint8 `[T, size, size, 3]`."""
  name = f'episode {index}'
  try:
    episode = source[index]
    name = episode.name
    trajectories.check_episode(episode, 'plain')
    times = episode.timestamps
    rows = np.arange(len(times))
    if fps:
      moments = np.arange(times[0], times[-1], 1 / fps)
      rows = np.unique(
        np.searchsorted(times, moments - 0.5 * np.diff(times).min())
      )
    parts = {
      key: x[rows]
      for key, x in episode._asdict().items()
      if isinstance(x, np.ndarray) and key not in ('video', 'actions')
    }
    frames = trajectories.read_frames(episode, rows, options)
  except DecodeError as error:
    return shards.BadFile(error.name or name, str(error))
  actions = episode.actions if len(rows) == len(times) else None
  return Episode(frames, **parts, name=name, actions=actions)


def _film(episode: Episode) -> Episode:
  """Encodes the frames as a film, one frame a row."""
  with io.BytesIO() as buffer:
    with av.open(buffer, 'w', format='mp4') as container:
      write_frames(
        container, episode.video, episode.video.shape[1:3], 15, _X264
      )
    return episode._replace(video=buffer.getvalue())


def _make_encode(
  options: SimpleNamespace,
) -> tuple[Callable[[Episode], Episode], dict[str, Any]]:
  """Makes what encodes the frames of an episode, and says by which encoder."""
  # Imported late: films need none of it.
  import jax

  from vjepa_jax.evaluation import batching
  from vjepa_jax.interop.load import load
  from vjepa_jax.parallel import mesh as mesh_lib
  from vjepa_jax.training.state import hash_params

  model = load(options.backbone, which=options.which, resize=False)
  mesh = mesh_lib.make_mesh(1, jax.local_devices())
  apply = batching.apply_encoder(model.encoder, dtype='float16')
  extract = batching.make_extract(
    apply, mesh, options.batch_size, '--batch_size'
  )
  sides = [options.resolution // side for side in model.encoder.tubelet[1:]]

  def encode(episode):
    features = extract(model.params, episode.video)
    if not np.isfinite(features).all():
      raise UserError(f'features of {episode.name} are not finite in float16')
    return episode._replace(
      video=features.reshape(-1, *sides, features.shape[-1])
    )

  return encode, {'encoder_sha256': hash_params(model.params)}


def main(options: SimpleNamespace) -> None:
  """Has the shards written by this machine, or through Beam."""
  engine.spread('prepare_episodes', options)


if __name__ == '__main__':
  command.run(main, define_flags)
