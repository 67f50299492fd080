"""Converts weights between workdirs, official files and Hugging Face folders.

python -m vjepa_jax.tools.convert --from=vitl.pt --to=vitl --resolution=256 \
  --frames=64
python -m vjepa_jax.tools.convert --from=WORKDIR --to=FOLDER
python -m vjepa_jax.tools.convert --from=facebook/vjepa2-vitl-fpc64-256 \
  --to=FOLDER --format=jax
"""

import json
from pathlib import Path
import sys

from absl import app, flags, logging
import jax
from orbax.checkpoint import v1 as ocp

from vjepa_jax.interop import huggingface
from vjepa_jax.interop.layout import Weights, WeightsError
from vjepa_jax.interop.load import read_weights
from vjepa_jax.tasks.pretrain import describe

_FROM = flags.DEFINE_string(
  'from',
  None,
  'A workdir, a Hugging Face folder, an official .pth.tar or .pt file, or a '
  'name on the Hub.',
  required=True,
)
_TO = flags.DEFINE_string('to', None, 'Folder to write.', required=True)
_FORMAT = flags.DEFINE_enum(
  'format',
  'huggingface',
  ['huggingface', 'jax'],
  'huggingface: for transformers.VJEPA2Model; jax: a checkpoint that '
  'vjepa_jax.load and probing take for a workdir.',
)
_WHICH = flags.DEFINE_string(
  'which', 'target_encoder', 'target_encoder, ema_encoder or encoder.'
)
_POSITIONS = flags.DEFINE_string(
  'positions', None, 'Of an official file: sincos or rope_tiled.'
)
_NUM_HEADS = flags.DEFINE_integer(
  'num_heads', None, 'Of an official file of no named size.'
)
_PREDICTOR_HEADS = flags.DEFINE_integer(
  'predictor_heads', None, "Of an official file's predictor."
)
_PREDICTOR = flags.DEFINE_bool('predictor', True, 'Convert the predictor too.')
_RESOLUTION = flags.DEFINE_integer(
  'resolution', None, 'Height and width of clips, where not known.'
)
_FRAMES = flags.DEFINE_integer(
  'frames', None, 'Frames of a clip, where not known.'
)


def write_huggingface(
  folder: Path,
  weights: Weights,
  resolution: int | None = None,
  frames: int | None = None,
) -> None:
  """Writes a folder for transformers.

  Args:
    folder: Where to write.
    weights: What to write; its probes are left out.
    resolution: Height and width of clips; None for what the weights say.
    frames: Frames of a clip; None for what the weights say.

  Raises:
    WeightsError: Something is missing, or transformers has no such model.
  """
  if weights.predictor is None:
    raise WeightsError('a VJEPA2Model has a predictor, and there is none')
  resolution = resolution or weights.resolution
  frames = frames or weights.frames
  if not (resolution and frames):
    raise WeightsError(
      'the clips of this model are not known: give --resolution and --frames'
    )
  huggingface.save_pretrained(
    folder,
    weights.encoder,
    weights.encoder_params,
    weights.predictor,
    weights.predictor_params,
    resolution=resolution,
    frames=frames,
  )


def write_workdir(
  folder: Path,
  weights: Weights,
  resolution: int | None = None,
  frames: int | None = None,
) -> None:
  """Writes a checkpoint at step 0, without optimizer state.

  Args:
    folder: Where to write.
    weights: What to write; its probes are left out.
    resolution: See `write_huggingface`.
    frames: See `write_huggingface`.
  """
  models = {'encoder': weights.encoder, 'predictor': weights.predictor}
  params = {
    'encoder': weights.encoder_params,
    'predictor': weights.predictor_params,
  }
  present = [name for name, model in models.items() if model is not None]
  directory = folder.absolute() / 'checkpoints'
  with ocp.training.Checkpointer(directory) as checkpointer:
    checkpointer.save_checkpointables(
      0,
      {
        'params': {name: params[name] for name in present},
        'target': weights.encoder_params,
      },
      custom_metadata={
        'model': {name: describe(models[name]) for name in present}
      },
    )
  clip = {
    'resolution': resolution or weights.resolution,
    'frames': frames or weights.frames,
  }
  text = json.dumps({'clip': clip}, indent=2)
  (folder / 'config.json').write_text(text + '\n')


def report(weights: Weights) -> None:
  """Prints what was read."""
  for name in ('encoder', 'predictor'):
    model, params = getattr(weights, name), getattr(weights, f'{name}_params')
    if model is None:
      print(f'{name}: none')
      continue
    count = sum(x.size for x in jax.tree.leaves(params))
    print(
      f'{name}: width {model.width}, depth {model.depth}, {model.num_heads} '
      f'heads, positions {model.positions}, {count:,} parameters'
    )
  if weights.probes:
    print(f'probes: {len(weights.probes)}, not converted')
  print(f'not used: {", ".join(weights.unused) or "nothing"}')


def convert() -> None:
  """Converts as the flags say.

  Raises:
    ValueError: The source, the target or their combination is impossible.
  """
  folder = Path(_TO.value)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise WeightsError(f'{folder} exists and is not empty: give a new --to')
  weights = read_weights(
    _FROM.value,
    which=_WHICH.value,
    with_predictor=_PREDICTOR.value,
    positions=_POSITIONS.value,
    num_heads=_NUM_HEADS.value,
    predictor_heads=_PREDICTOR_HEADS.value,
  )
  print(f'read {_FROM.value}')
  report(weights)
  if weights.encoder is None:
    raise WeightsError(f'{_FROM.value} holds no encoder')
  write = {'huggingface': write_huggingface, 'jax': write_workdir}
  write[_FORMAT.value](folder, weights, _RESOLUTION.value, _FRAMES.value)
  print(f'wrote {folder} ({_FORMAT.value})')


def main(argv: list[str]) -> None:
  """Converts; what is wrong with the input is one line, without a traceback."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  # Orbax tells its life at the level of information.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= logging.logging.WARNING
      or 'vjepa_jax' in record.pathname
    )
  )
  try:
    convert()
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
