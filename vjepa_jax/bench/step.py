"""`bench step`: our training step on the CPU against the same one in torch."""

import argparse
from collections.abc import Callable
import time
from typing import Any

import jax
from ml_collections import config_dict
import numpy as np

from configs import base, vjepa1
from vjepa_jax.bench import measure
from vjepa_jax.bench.masks import build_samplers
from vjepa_jax.errors import UserError
from vjepa_jax.interop import layout, names
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.tasks.program import build_program, get_grid
from vjepa_jax.training.objectives.base import Batch

_AIM = 0.8
# Near the published shares of context and target of 8 x 7 x 7 tubelets.
_SHORT, _LONG = (96, 192), (24, 288)
_CONSTANTS = {'learning_rate': 1e-4, 'weight_decay': 0.04, 'ema': 0.998}


OPTIONS = {
  'batch_size': {'type': int, 'default': 4, 'help': 'clips a step (4)'},
  'cpu_time': {
    'action': 'store_true',
    'help': 'count CPU seconds; on a busy machine, pin to one core (taskset)',
  },
}


def make_config(batch_size: int, quick: bool) -> config_dict.ConfigDict:
  """Takes V-JEPA 1 at ViT-Tiny and 16 x 112 px; `quick` is a toy."""
  config = vjepa1.get_config('l16')
  config.encoder.size = 'nano' if quick else 'tiny'
  config.clip.resolution = 112
  config.data.batch_size = batch_size
  config.compute_dtype = 'float32'
  config.remat = 'none'
  config.clip_norm = None
  if quick:
    config.predictor.update(width=48, depth=2)
  base.set_published_masks(config, _SHORT, _LONG)
  for name, value in _CONSTANTS.items():
    config[name] = {**config[name].to_dict(), 'kind': 'constant'}
    config[name].update(value=value, final=None)
  config.learning_rate.update(start=None, warmup_steps=None)
  return config


def make_batch(config: config_dict.ConfigDict) -> Batch:
  """Makes a batch of noise with masks of the config, as numpy arrays."""
  rng = np.random.default_rng(0)
  clip, size = config.clip, config.data.batch_size
  masks = []
  for sampler in build_samplers(config).values():
    draws = [sampler(rng) for _ in range(size)]
    context, target = (np.stack(ids) for ids in zip(*draws, strict=True))
    masks.append({'context': context, 'target': target})
  shape = (size, clip.frames, clip.resolution, clip.resolution, 3)
  video = rng.integers(0, 256, shape, dtype=np.uint8)
  return {'video': {'pixels': video, 'masks': tuple(masks)}}


def build_steps(
  config: config_dict.ConfigDict,
) -> dict[str, Callable[[Batch], float]]:
  """Builds our step and torch's, with the same weights, on one CPU device.

  Each takes a step on a batch and returns its loss, when all of it is done.
  """
  try:
    from vjepa_jax.bench.torch_step import TorchStep  # noqa: PLC0415
  except ImportError as error:
    raise UserError(f"{error}: pip install -e '.[parity]'") from error

  mesh = make_mesh(devices=jax.devices('cpu')[:1])
  program = build_program(config, mesh, 1000, 100)
  init = jax.jit(program.init, out_shardings=program.shardings)
  state = init(jax.random.key(0))
  encoder, predictor = program.objective.encoder, program.objective.predictor
  params, tubelet = state.params, encoder.tubelet
  weights = {
    'encoder': layout.export(names.ENCODER, params['encoder'], tubelet=tubelet),
    'predictor': layout.export(names.PREDICTOR, params['predictor']),
  }
  theirs = TorchStep(encoder, predictor, get_grid(config), weights, _CONSTANTS)

  def take_ours(batch):
    nonlocal state
    with jax.set_mesh(mesh):
      batch = jax.device_put(batch, program.batch_sharding)
      state, metrics = program.train_step(state, batch)
      jax.block_until_ready(state)
    return float(metrics['loss'])

  return {
    measure.OURS: take_ours,
    'torch': lambda batch: theirs(batch['video']),
  }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Times both steps in turn and prints the ratio."""
  if arguments.batch_size < 1:
    raise UserError(f'--batch_size={arguments.batch_size} is too few')
  config = make_config(arguments.batch_size, arguments.quick)
  batch = make_batch(config)
  losses, runs = {}, {}
  for name, step in build_steps(config).items():
    found = losses[name] = []
    runs[name] = lambda _, step=step, found=found: found.append(step(batch))
  times = measure.alternate(
    runs,
    arguments.rounds or (2 if arguments.quick else 10),
    clock=time.process_time if arguments.cpu_time else time.perf_counter,
    label='step',
  )
  result = measure.compare(times)
  # The same work must give the same numbers, or the times mean nothing.
  drift = np.abs(np.divide(losses[measure.OURS], losses['torch']) - 1).max()
  result.update(
    unit='s', losses=losses, largest_relative_loss_difference=float(drift)
  )
  clip, clips = config.clip, config.data.batch_size
  print(
    f'training step, ViT-{config.encoder.size}, float32, {clip.frames} x '
    f'{clip.resolution} px, batch {clips}; losses agree to '
    f'{drift:.1e}'
  )
  measure.print_cases({'': result}, 'clips a second', lambda t: clips / t)
  print(f'ours / torch: {result["ratio"]["torch"]:.2f} (aim: {_AIM} or less)')
  return result
