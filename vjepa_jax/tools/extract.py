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
files. Several hosts share the work if each is given --host_index and
--num_hosts, in a program that uses jax.distributed by themselves. Videos that
cannot be read are listed with the reason in OUTPUT/quarantine.jsonl (host 3:
quarantine-3.jsonl).
"""

import sys

from absl import app, flags, logging
import jax
import jax.numpy as jnp

from vjepa_jax import mistakes
from vjepa_jax.data import sources
from vjepa_jax.data.pipeline import ClipOptions
from vjepa_jax.evaluation.extraction import extract
from vjepa_jax.interop.load import LoadedEncoder, load, read_clip_rate

_BACKBONE = flags.DEFINE_string(
  'backbone', None, 'Workdir, Hugging Face folder or official file.'
)
_INPUT = flags.DEFINE_string('input', None, 'Any source of videos.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for the shards.')
_WHICH = flags.DEFINE_string(
  'which', 'target_encoder', 'target_encoder or encoder, of the backbone.'
)
_SEGMENTS = flags.DEFINE_integer(
  'segments', 1, 'Clips of each video.', lower_bound=1
)
_FRAMES = flags.DEFINE_integer(
  'frames', None, 'Frames of a clip; those of the backbone.', lower_bound=1
)
_RESOLUTION = flags.DEFINE_integer(
  'resolution', None, 'Of a clip, pixels; that of the backbone.', lower_bound=1
)
_FRAME_STEP = flags.DEFINE_integer(
  'frame_step', None, 'Video frames from one clip frame to the next; or'
)
_FPS = flags.DEFINE_float(
  'fps', None, "clip frames a second. Default: the backbone's, else a step of 4"
)
_POOL = flags.DEFINE_enum(
  'pool', 'none', ['none', 'mean'], 'Keep all tokens, or their mean.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float16', ['float16', 'float32'], 'Of the features in the shards.'
)
_COMPUTE_DTYPE = flags.DEFINE_enum(
  'compute_dtype', 'float32', ['float32', 'bfloat16'], 'Of the encoder.'
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 32, 'Clips encoded at a time, on this host.', lower_bound=1
)
_SHARDS = flags.DEFINE_integer(
  'shards', None, 'Number of shards; one for 256 videos.', lower_bound=1
)
_NUM_THREADS = flags.DEFINE_integer(
  'num_threads', None, 'Decoding threads; as many as cores.', lower_bound=1
)
_HOST_INDEX = flags.DEFINE_integer('host_index', None, 'Of this host, from 0.')
_NUM_HOSTS = flags.DEFINE_integer('num_hosts', None, 'Hosts that share this.')


def choose_options(model: LoadedEncoder) -> ClipOptions:
  """Returns how the flags cut clips; what they leave open, the backbone says.

  Raises:
    ValueError: The size of the clips is not known.
  """
  frames = _FRAMES.value or model.frames
  resolution = _RESOLUTION.value or model.resolution
  if not (frames and resolution):
    raise ValueError(
      f'{_BACKBONE.value} does not say what clips it was trained with: give '
      '--frames and --resolution'
    )
  rate = {'frame_step': _FRAME_STEP.value, 'fps': _FPS.value}
  if set(rate.values()) == {None}:
    rate = read_clip_rate(_BACKBONE.value)
  return ClipOptions(
    frames=frames, resolution=resolution, num_clips=_SEGMENTS.value, **rate
  )


def main(argv: list[str]) -> None:
  """Extracts as the flags say."""
  if len(argv) > 1:
    raise ValueError(f'unknown argument {argv[1]!r}')
  # Orbax tells its life at the level of information.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= logging.logging.WARNING
      or 'vjepa_jax' in record.pathname
    )
  )
  if (_HOST_INDEX.value is None) != (_NUM_HOSTS.value is None):
    raise ValueError('give both of --host_index and --num_hosts, or none')
  alone = _NUM_HOSTS.value is None
  source = sources.open_source(_INPUT.value)
  model = load(
    _BACKBONE.value,
    which=_WHICH.value,
    resize=False,
    dtype=jnp.dtype(_COMPUTE_DTYPE.value),
  )
  options = choose_options(model)
  rate = f'a step of {options.frame_step}'
  if options.fps:
    rate = f'{options.fps:g} frames a second'
  logging.info(
    '%d videos; of each %d clips of %d frames, %s, %d pixels',
    len(source),
    options.num_clips,
    options.frames,
    rate,
    options.resolution,
  )
  num_videos, num_bad = extract(
    source,
    _OUTPUT.value,
    model.encoder,
    model.params,
    options,
    pool=_POOL.value,
    dtype=_DTYPE.value,
    batch_size=_BATCH_SIZE.value,
    num_shards=_SHARDS.value,
    num_threads=_NUM_THREADS.value,
    host_index=jax.process_index() if alone else _HOST_INDEX.value,
    num_hosts=jax.process_count() if alone else _NUM_HOSTS.value,
  )
  print(f'features of {num_videos - num_bad} videos are in {_OUTPUT.value}')
  if num_bad:
    print(f'left out {num_bad}, listed in quarantine*.jsonl there')


if __name__ == '__main__':
  flags.mark_flags_as_required(['backbone', 'input', 'output'])
  try:
    app.run(main, flags_parser=mistakes.parse_flags)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(mistakes.explain(error))
