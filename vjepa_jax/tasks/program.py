"""What a config builds: models, objective, state, shardings and the step.

Everything here is abstract until it is called, so that the same program is
compiled for devices that are attached and for those that are not.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vjepa_jax.errors import UserError
from vjepa_jax.interop.load import make_abstract
from vjepa_jax.models import zoo
from vjepa_jax.models.attention import choose_attention
from vjepa_jax.models.tubelets import compute_grid
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.tasks.teacher import name_teacher, read_teacher
from vjepa_jax.training.objectives import regularized, salt, vjepa, vjepa21
from vjepa_jax.training.objectives.base import Batch, Objective, Setup
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.schedules import Schedule, make_schedule
from vjepa_jax.training.state import TrainState, init_state
from vjepa_jax.training.step import TrainStep, make_train_step

# What builds each kind of objective, and kinds whose options it takes too.
OBJECTIVES = {
  'vjepa': (vjepa.build,),
  'vjepa21': (vjepa21.build, 'vjepa'),
  'salt': (salt.build, 'vjepa'),
  'regularized': (regularized.build, 'vjepa'),
}


class Stream(NamedTuple):
  """Of which size the clips of a stream are, and what hides parts of them."""

  frames: int
  resolution: int
  batch_size: int  # clips a step, over all devices
  mask_names: tuple[str, ...]
  group: str  # of the config, with sources and batch_size
  noun: str  # 'clips' or 'images'


class Program(NamedTuple):
  """A training program for one mesh."""

  objective: Objective
  # From a random key to a state, to be jitted with `shardings`. Nothing in it
  # is frozen: that is in the checkpoint of a teacher.
  init: Callable[[jax.Array], TrainState]
  abstract: TrainState  # shapes and dtypes
  shardings: TrainState  # where each leaf lives
  batch_sharding: NamedSharding
  train_step: TrainStep  # jitted; it takes over the state it is given


def build_program(
  config: ConfigDict, mesh: Mesh, total_steps: int, steps_per_epoch: float
) -> Program:
  """Builds the training program of a config, for devices attached or not.

  Raises:
    UserError: The config does not fit together or does not fit the mesh.
  """
  for name, stream in list_streams(config).items():
    check_batch(config, mesh, stream.batch_size, stream.group)
    get_grid(config, name)  # raises where clips are not whole tubelets
  objective = build_objective(config, mesh)
  frozen = None
  if objective.teacher is not None:
    frozen = make_abstract(objective.teacher.encoder)
  schedules = make_schedules(config, total_steps, steps_per_epoch)
  return make_program(config, objective, schedules, mesh, frozen)


def make_abstract_batch(config: ConfigDict) -> Batch:
  """Returns shapes and dtypes of the batches that a config trains on."""

  def describe(stream):
    rows, size = stream.batch_size, stream.resolution

    def ids(count):
      return jax.ShapeDtypeStruct((rows, count), jnp.int32)

    specs = [config.masks[name] for name in stream.mask_names]
    sides = rows, stream.frames, size, size, 3
    return {
      'pixels': jax.ShapeDtypeStruct(sides, jnp.uint8),
      'masks': tuple(
        {'context': ids(spec.context_tokens), 'target': ids(spec.target_tokens)}
        for spec in specs
      ),
    }

  return {name: describe(x) for name, x in list_streams(config).items()}


def list_streams(config: ConfigDict) -> dict[str, Stream]:
  """Lists the streams of a batch: 'video', and 'image' where there are any."""
  clip, image = config.clip, config.get('image')
  streams = {
    'video': Stream(
      clip.frames,
      clip.resolution,
      config.data.batch_size,
      tuple(config.mask_names),
      'data',
      'clips',
    )
  }
  if image and image.batch_size:
    streams['image'] = Stream(
      1,
      image.resolution,
      image.batch_size,
      tuple(image.mask_names),
      'image',
      'images',
    )
  return streams


def get_steps(
  config: ConfigDict, name: str, steps_per_epoch: float
) -> int | None:
  """Reads a duration, `{name}_steps` or `{name}_epochs`, in steps.

  Raises:
    UserError: Both are set, or the total is not.
  """
  steps, epochs = config[f'{name}_steps'], config[f'{name}_epochs']
  if steps is not None and epochs is not None:
    raise UserError(f'set {name}_steps or {name}_epochs, not both')
  if steps is None and epochs is None:
    if name == 'total':
      raise UserError('set config.total_steps or config.total_epochs')
    return 0
  return steps if epochs is None else max(1, round(epochs * steps_per_epoch))


def get_grid(config: ConfigDict, name: str = 'video') -> tuple[int, int, int]:
  """Returns the tubelet grid (T, H, W) of a stream's clips."""
  stream, tubelet = list_streams(config)[name], tuple(config.encoder.tubelet)
  if name == 'image':
    tubelet = (1, *tubelet[1:])
  size = stream.resolution
  return compute_grid((1, stream.frames, size, size), tubelet)


def build_objective(config: ConfigDict, mesh: Mesh) -> Objective:
  """Builds the objective, its models for the platform of the mesh.

  Raises:
    UserError: There is no such objective, or its options do not go together.
  """
  kind = config.objective.kind
  if kind not in OBJECTIVES:
    raise UserError(f'objective.kind {kind!r} is not one of {list(OBJECTIVES)}')
  field = name_teacher(config)
  compute, streams = get_compute(config, mesh), list_streams(config)
  encoder = zoo.build_encoder(**config.encoder, remat=config.remat, **compute)
  setup = Setup(
    encoder,
    functools.partial(zoo.build_predictor, encoder, **config.predictor),
    lambda path: read_teacher(path, encoder.tubelet, field).clone(**compute),
    {name: stream.mask_names for name, stream in streams.items()},
    config.seed,
  )
  build, *others = OBJECTIVES[kind]
  options = {}
  for name in (*others, kind):
    options |= config.objective[name].to_dict()
  if options.get('teacher', '') is None:
    raise UserError(f'{field} is not set: give the workdir of the teacher')
  objective = build(setup, **options)
  unseen = sorted(set(streams) - set(objective.streams))
  if unseen:
    raise UserError(
      f'objective.kind {kind!r} is not trained on streams {unseen}: set '
      f'{" and ".join(f"config.{name}.batch_size=0" for name in unseen)}'
    )
  return objective


def make_schedules(
  config: ConfigDict, total_steps: int, steps_per_epoch: float
) -> dict[str, Schedule]:
  """Makes the schedules of learning rate, weight decay and EMA momentum."""
  length = int(config.schedule_scale * total_steps)
  return {
    # These two count steps from 1, as published; the momentum from 0.
    'learning_rate': make_rate(config, length, steps_per_epoch, offset=1),
    'weight_decay': make_schedule(
      **config.weight_decay, total_steps=length, offset=1
    ),
    'ema': make_schedule(**config.ema, total_steps=length),
  }


def make_rate(
  config: ConfigDict,
  total_steps: int,
  steps_per_epoch: float,
  *,
  scale: float = 1.0,
  offset: int = 0,
) -> Schedule:
  """Makes the schedule of the learning rate, `scale` times the config's."""
  rate = config.learning_rate
  values = {name: rate[name] for name in ('start', 'value', 'final')}
  return make_schedule(
    rate.kind,
    **{name: x and x * scale for name, x in values.items()},
    warmup_steps=get_steps(rate, 'warmup', steps_per_epoch),
    decay_steps=rate.get('decay_steps'),
    total_steps=total_steps,
    offset=offset,
  )


def get_compute(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """Returns `dtype` and `attention` of modules, for the mesh's platform."""
  dtype = jnp.dtype(config.compute_dtype)
  attention, platform = config.attention, mesh_lib.get_platform(mesh)
  best = choose_attention(platform, dtype)
  if attention == 'auto':
    attention = best
  elif attention in ('cudnn', 'pallas') and attention != best:
    raise UserError(
      f'config.attention {attention!r} does not run on {platform!r} devices in '
      f"{dtype}; there is 'auto', which is {best!r} here"
    )
  return {'dtype': dtype, 'attention': attention}


def check_batch(
  config: ConfigDict,
  mesh: Mesh,
  clips_per_step: int,
  group: str = 'data',
) -> None:
  """Raises UserError if a batch does not split evenly over the devices."""
  shards, parts = mesh.devices.size, config.get('microbatches', 1)
  if clips_per_step % (shards * parts):
    pieces, remedy = (
      f'{shards} data shards',
      f'change config.{group}.batch_size',
    )
    if 'microbatches' in config:
      pieces += f' x {parts} microbatches'
      remedy += ' or config.microbatches'
    raise UserError(
      f'a batch of {clips_per_step} clips is not divisible by {pieces}: '
      f'{remedy}'
    )


def make_program(
  config: ConfigDict,
  objective: Objective,
  schedules: dict[str, Schedule],
  mesh: Mesh,
  frozen: Any = None,
) -> Program:
  """Makes the program of an objective; arguments as of `jit_program`."""
  tx = make_optimizer(**config.optimizer, layer_decay=config.get('layer_decay'))
  train_step = make_train_step(
    objective,
    tx,
    schedules,
    clip_norm=config.clip_norm,
    clip_start_step=config.get('clip_start_step', 0),
    microbatches=config.get('microbatches', 1),
  )
  init = functools.partial(init_state, objective, tx)
  return jit_program(objective, init, train_step, mesh, frozen)


def jit_program(
  objective: Any,
  init: Callable[[jax.Array], TrainState],
  train_step: TrainStep,
  mesh: Mesh,
  frozen: Any = None,
) -> Program:
  """Decides where each leaf of a state lives, and jits the step for that.

  Args:
    objective, init: See `Program`.
    train_step: Takes over the state it is given.
    mesh: Devices, attached or not.
    frozen: Shapes of what is frozen.

  Raises:
    UserError: Too much of the state would be whole on every device.
  """
  abstract = jax.eval_shape(init, jax.random.key(0)).replace(frozen=frozen)
  shardings = sharding.shard_tree(abstract, mesh)
  sharding.check_sufficiently_sharded(abstract, shardings, mesh)
  rows = sharding.shard_batch(mesh)
  train_step = jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(shardings, rows),
    out_shardings=(shardings, sharding.replicate(mesh)),
  )
  return Program(objective, init, abstract, shardings, rows, train_step)
