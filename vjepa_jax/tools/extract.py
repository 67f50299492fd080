r"""Writes the frozen features of videos to ArrayRecord shards.

Example:

  python -m vjepa_jax.tools.extract --backbone=runs/mine --input=videos/ \
      --output=features/train --segments=2

--backbone is whatever vjepa_jax.load takes: a workdir, a Hugging Face folder or
an official file. --input is whatever training takes: a folder, a glob, a
manifest, ArrayRecord shards or tfds:name/split. Each video is cut into
--segments equal parts; of each part one clip is encoded, its frames the central
squares of evaluation. vjepa_jax.data.features.FeatureSource reads the result;
configs/probe.py trains on it.

An interrupted run is continued by the same command and ends with the same
files. Machines share the work, and --engine=beam hands it to Apache Beam, as
vjepa_jax.tools.prepare says; in a program that uses jax.distributed its hosts
share it by themselves. Videos that cannot be read are listed with the reason
beside their shard, and once all shards are there in OUTPUT/quarantine.jsonl.
"""

from types import SimpleNamespace

from absl import logging
import jax
import jax.numpy as jnp

from vjepa_jax.data import sources
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation import extraction
from vjepa_jax.interop.load import LoadedEncoder, load, read_clip
from vjepa_jax.tools import command, engine


def choose_options(
  options: SimpleNamespace, model: LoadedEncoder
) -> ClipOptions:
  """Returns how the flags cut clips; what they leave open, the backbone says.

  Raises:
    UserError: The size of the clips is not known.
  """
  frames = options.frames or model.frames
  resolution = options.resolution or model.resolution
  if not (frames and resolution):
    raise UserError(
      f'{options.backbone} does not say what clips it was trained with: give '
      '--frames and --resolution'
    )
  rate = {'frame_step': options.frame_step, 'fps': options.fps}
  if set(rate.values()) == {None}:
    clip = read_clip(options.backbone)
    rate = {name: clip[name] for name in rate}
  return ClipOptions(
    frames=frames, resolution=resolution, num_clips=options.segments, **rate
  )


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('backbone', 'Whatever vjepa_jax.load takes.', required=True)
  define.string('input', 'Any source of videos.', required=True)
  define.string('output', 'Folder for the shards.', required=True)
  define.string('which', 'Or encoder.', 'target_encoder')
  define.integer('segments', 'Clips of each video.', 1, least=1)
  define.integer('frames', 'Frames of a clip; as the backbone.', least=1)
  define.integer('resolution', 'Of a clip, pixels; as the backbone.', least=1)
  define.integer('frame_step', 'Video frames a clip frame; or')
  define.float('fps', "clip frames a second; the backbone's, else a step of 4.")
  define.enum('pool', 'All tokens, or their mean.', 'none', ['none', 'mean'])
  define.enum('dtype', 'Of the features.', 'float16', ['float16', 'float32'])
  define.enum(
    'compute_dtype', 'Of the encoder.', 'float32', ['float32', 'bfloat16']
  )
  define.integer('batch_size', 'Clips a time, on this host.', 32, least=1)
  define.integer('shards', 'Number of shards; one for 256 videos.', least=1)
  define.integer('num_threads', 'Decoding threads; as many as cores.', least=1)
  engine.add_flags(define)


def begin(options: SimpleNamespace) -> engine.Work:
  """Begins what the flags say."""
  source = sources.open_source(options.input)
  model = load(
    options.backbone,
    which=options.which,
    resize=False,
    dtype=jnp.dtype(options.compute_dtype),
  )
  clip = choose_options(options, model)
  logging.info('%d videos, clips: %s', len(source), clip)
  paths, extract = extraction.start(
    source,
    options.output,
    model.encoder,
    model.params,
    clip,
    pool=options.pool,
    dtype=options.dtype,
    batch_size=options.batch_size,
    num_shards=options.shards,
    num_threads=options.num_threads,
  )

  def write(host_index, num_hosts):
    num_videos, num_bad = extract(host_index, num_hosts)
    print(f'features of {num_videos - num_bad} videos are in {options.output}')
    if num_bad:
      print(f'left out {num_bad}, listed in *.jsonl there')

  return paths, write


def main(options: SimpleNamespace) -> None:
  """Has the shards written by this machine, or through Beam."""
  alone = options.host_index is None and options.num_hosts is None
  if alone and options.engine == 'hosts' and jax.process_count() > 1:
    options.host_index = jax.process_index()
    options.num_hosts = str(jax.process_count())
  engine.spread('extract', options)


if __name__ == '__main__':
  command.run(main, define_flags)
