"""Loads world models: all that predicts in one checkpoint."""

import json
import os
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.load import (
  make_abstract,
  make_hashable,
  read_config,
  read_encoder,
  read_weights,
)
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.models.attention import choose_attention
from vjepa_jax.training import checkpoint
from vjepa_jax.world.imagination import ActionModel
from vjepa_jax.world.model import WorldModel


def load_world_model(
  source: str | os.PathLike,
  *,
  step: int | None = None,
  **options: Any,
) -> WorldModel:
  """Loads what predicts, and what makes the features that are predicted.

  The context encoder was trained with the predictor, and feeds it; the target
  encoder is its moving average, or the teacher of the run. A Hugging Face
  folder has one encoder, which is used as both.

  Args:
    source: A workdir of pretraining, a Hugging Face folder or name, or an
      official file.
    step: Of a workdir, which checkpoint; None for the newest.
    **options: positions, predictor_positions, num_heads and predictor_heads
      of an official file, see `pytorch.read_checkpoint`.

  Raises:
    WeightsError: The source cannot be used, or has no predictor.
    CheckpointError: The same, of a workdir.
  """
  online = read_weights(source, which='encoder', step=step, **options)
  if online.predictor is None:
    raise WeightsError(
      f'{source} has no predictor: prediction needs a workdir of pretraining, '
      'or weights with one'
    )
  if isinstance(online.predictor, ActionPredictor):
    raise WeightsError(
      f'{source} predicts by actions: it is for python -m '
      'vjepa_jax.tools.plan_actions'
    )
  config = read_config(source)
  objective = _read_objective(config)
  if objective['targets'] == 'frozen':
    target_encoder, target = _load_teacher(source)
  else:
    averaged = read_weights(source, with_predictor=False, step=step, **options)
    target_encoder, target = averaged.encoder, averaged.encoder_params
  clip = config.get('clip', {})
  attention = choose_attention(jax.devices()[0].platform, jnp.float32)
  sources = config.get('data', {}).get('sources', {}).values()
  models = online.encoder, online.predictor, target_encoder
  params = {
    'encoder': online.encoder_params,
    'predictor': online.predictor_params,
    'target': target,
  }
  world = WorldModel(
    *(m.clone(dtype=jnp.float32, attention=attention) for m in models),
    jax.device_put(params),
    clip=ClipOptions(**make_hashable(clip)) if 'frame_step' in clip else None,
    sources=tuple(source for source in sources if source.get('path')),
    held_out=config.get('probe', {}).get('test', ''),
    mask_kinds=tuple(
      config['masks'][name]['kind'] for name in config.get('mask_names', ())
    ),
    resolution=online.resolution,
    frames=online.frames,
    **objective,
  )
  made = target_encoder.width * len(world.levels or (None,))
  predicted = world.predictor.out_width
  if world.targets != 'pixels' and predicted != made:
    raise WeightsError(
      f'{source} is distilled: what it predicts are {predicted} features of a '
      f'teacher that it does not hold, and it has {made} of its own'
    )
  return world


def _read_objective(config: dict[str, Any]) -> dict[str, str]:
  """Reads 'targets', 'target_view' and 'target_norm' of a run.

  Runs from before objectives had a kind have them in `config.objective` itself.
  """
  objective = config.get('objective', {})
  options = objective.get('vjepa', objective)
  targets, kind = objective.get('targets', 'ema'), objective.get('kind')
  if objective.get(kind, {}).get('teacher'):
    targets = 'frozen'
  elif kind == 'salt':
    targets = 'pixels'
  return {
    'targets': targets,
    'target_view': options.get('target_view', 'clip'),
    'target_norm': options.get('target_norm', 'layer'),
  }


def _load_teacher(source: str | os.PathLike) -> tuple[Any, Any]:
  """Loads the teacher whose features a run predicts."""
  try:
    used = json.loads((epath.Path(source) / 'teacher.json').read_text())
  except FileNotFoundError:
    raise WeightsError(
      f'{source} predicts the features of a frozen teacher, and has no '
      'teacher.json that names it'
    ) from None
  encoder = read_encoder(used['path'])
  return encoder, checkpoint.load_item(
    used['path'], make_abstract(encoder), step=used['step']
  )


def load_action_model(source: str | os.PathLike) -> ActionModel:
  """Loads a predictor with actions, and the encoder that it goes with.

  Args:
    source: A workdir of configs/action.py, or the released file of V-JEPA 2-AC.

  Raises:
    WeightsError: The source cannot be used, predicts without actions, or needs
      more than them.
  """
  weights = read_weights(source)
  if not isinstance(weights.predictor, ActionPredictor):
    raise WeightsError(
      f'{source} holds no predictor with actions: train one by python main.py '
      '--config=configs/action.py'
    )
  config = read_config(source)
  if config.get('extrinsics'):
    raise WeightsError(
      f'{source} was trained with the place of its camera, which planning does '
      'not give: train with --config.extrinsics=False'
    )
  attention = choose_attention(jax.devices()[0].platform, jnp.float32)
  models = weights.encoder, weights.predictor
  params = {
    'encoder': weights.encoder_params,
    'predictor': weights.predictor_params,
  }
  return ActionModel(
    *(m.clone(dtype=jnp.float32, attention=attention) for m in models),
    jax.device_put(params),
    state_kind=config.get('state_kind', 'pose'),
    one_step=weights.one_step,
    resolution=weights.resolution,
  )
