r"""Converts weights between workdirs, official files and Hugging Face folders.

python -m vjepa_jax.tools.convert --from=vitl.pt --to=vitl --resolution=256 \
  --frames=64
python -m vjepa_jax.tools.convert --from=WORKDIR --to=FOLDER
python -m vjepa_jax.tools.convert --from=facebook/vjepa2-vitl-fpc64-256 \
  --to=FOLDER --format=jax
python -m vjepa_jax.tools.convert --from=WORKDIR --to=FILE.pt --format=official
"""

from collections.abc import Mapping
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

from etils import epath
import jax
from orbax.checkpoint import v1 as ocp

from vjepa_jax.data import storage
from vjepa_jax.interop.huggingface import save_pretrained
from vjepa_jax.interop.layout import Weights, WeightsError
from vjepa_jax.interop.load import (
  describe,
  name_predictor,
  read_config,
  read_weights,
)
from vjepa_jax.interop.pytorch import write_checkpoint
from vjepa_jax.tools import command
from vjepa_jax.training.checkpoint import get_directory

_KEPT = 'state_kind', 'extrinsics'  # see configs/action.py


def write_workdir(
  folder: epath.Path, weights: Weights, config: Mapping[str, Any] | None = None
) -> None:
  """Writes a checkpoint at step 0, without optimizer state and probes.

  Of the config that it was trained by is kept what a predictor with actions
  takes beside them.
  """
  params = {'encoder': weights.encoder_params}
  model = {'encoder': describe(weights.encoder)}
  if weights.predictor is not None:
    params['predictor'] = weights.predictor_params
    model[name_predictor(weights.predictor)] = describe(weights.predictor)
    model['one_step'] = weights.one_step
  with ocp.training.Checkpointer(get_directory(folder)) as checkpointer:
    checkpointer.save_checkpointables(
      0,
      {'params': params, 'target': weights.encoder_params},
      custom_metadata={'model': model},
    )
  clip = {'resolution': weights.resolution, 'frames': weights.frames}
  kept = {k: config[k] for k in _KEPT if config and k in config}
  text = json.dumps({'clip': clip, **kept}, indent=2)
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
  if weights.one_step:
    print('the predictor is of use one step ahead alone: see docs/planning.md')
  if weights.probes:
    print(f'probes: {len(weights.probes)}, not converted')
  print(f'not used: {", ".join(weights.unused) or "nothing"}')


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string(
    'from',
    'A workdir, a Hugging Face folder, an official .pth.tar or .pt file, or a '
    'name on the Hub.',
    required=True,
  )
  define.string('to', 'Folder, or official file, to write.', required=True)
  define.enum(
    'format',
    'huggingface: for transformers.VJEPA2Model; jax: a checkpoint that '
    'vjepa_jax.load, probing and config.init_from take for a workdir; '
    'official: a .pt file for the code of V-JEPA 2 or 2.1.',
    'huggingface',
    ['huggingface', 'jax', 'official'],
  )
  define.string('which', 'Or ema_encoder, or encoder.', 'target_encoder')
  define.string('positions', 'Of an official file, see models/positions.py.')
  define.string(
    'predictor_positions',
    'Of a V-JEPA 2.1 file: rope_rescaled as trained, rope_interleaved as '
    'torch.hub has it.',
  )
  define.integer('num_heads', 'Of an official file of no named size.')
  define.integer('predictor_heads', "Of an official file's predictor.")
  define.bool('predictor', 'Convert the predictor too.', True)
  define.integer('resolution', 'Height and width of clips, where not known.')
  define.integer('frames', 'Frames of a clip, where not known.')


def main(options: SimpleNamespace) -> None:
  """Converts as the flags say."""
  source = getattr(options, 'from')
  folder = epath.Path(options.to)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise WeightsError(f'{folder} exists and is not empty: give a new --to')
  if options.format == 'official' and folder.suffix != '.pt':
    raise WeightsError(
      f'--format=official writes a file: give --to={folder}.pt'
    )
  weights = read_weights(
    source,
    which=options.which,
    with_predictor=options.predictor,
    positions=options.positions,
    predictor_positions=options.predictor_positions,
    num_heads=options.num_heads,
    predictor_heads=options.predictor_heads,
  )
  print(f'read {source}')
  report(weights)
  weights = dataclasses.replace(
    weights,
    resolution=options.resolution or weights.resolution,
    frames=options.frames or weights.frames,
  )
  if options.format == 'jax':
    write_workdir(folder, weights, read_config(source))
  elif options.format == 'official':
    write_checkpoint(folder, weights)
  else:
    with storage.writing_folder(folder) as local:
      save_pretrained(local, weights)
  print(f'wrote {folder} ({options.format})')


if __name__ == '__main__':
  command.run(main, define_flags)
