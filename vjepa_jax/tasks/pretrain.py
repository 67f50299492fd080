"""Pretraining: from a config to a trained encoder."""

from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict

from vjepa_jax.data import pipeline, sources
from vjepa_jax.evaluation import probing
from vjepa_jax.evaluation.online import make_online_probe
from vjepa_jax.masks.fixed_size import build_mask_sampler
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.tasks import session
from vjepa_jax.tasks.program import (
  build_program,
  check_steps,
  get_grid,
  get_steps,
)
from vjepa_jax.tasks.smoke import shrink
from vjepa_jax.tasks.teacher import load_teacher
from vjepa_jax.training.checkpoint import (
  Checkpoints,
  load_initial,
  write_config,
)
from vjepa_jax.training.diagnostics import make_diagnose
from vjepa_jax.training.state import TrainState


def pretrain(
  config: config_dict.ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> TrainState | None:
  """Pretrains, or resumes what was interrupted in this workdir.

  Args:
    config: See `configs/base.py`.
    workdir: Directory of the run, shared by all hosts.
    profile_steps: First and last step to trace.

  Returns:
    The final state; None if the platform took the machine back before.

  Raises:
    ValueError: The config does not fit together; before anything is compiled.
  """
  workdir = epath.Path(workdir)
  if config.smoke:
    config = shrink(config, workdir)
  write_config(workdir, config)

  # Devices and data.
  mesh = mesh_lib.make_mesh(config.fsdp)
  batch_size = config.data.batch_size
  loader = make_loader(config)
  steps_per_epoch = sum(len(s) for s in loader.sources) / batch_size
  total_steps = get_steps(config, 'total', steps_per_epoch)
  check_steps(workdir, 0, total_steps, profile_steps)

  # Models, shardings, step.
  program = build_program(config, mesh, total_steps, steps_per_epoch)
  encoder, predictor = program.objective.encoder, program.objective.predictor
  abstract, shardings = program.abstract, program.shardings
  diagnose = jax.jit(
    make_diagnose(encoder), out_shardings=sharding.replicate(mesh)
  )
  evaluate = make_evaluate(config, encoder, mesh)

  # State: from this run's checkpoint, from another run's, or new.
  checkpoints = Checkpoints(
    workdir,
    model={'encoder': describe(encoder), 'predictor': describe(predictor)},
    **config.checkpoint,
  )
  restored = checkpoints.restore(abstract, shardings)
  if restored is not None:
    state, position = restored
  elif config.init_from:
    state, position = load_initial(config.init_from, abstract, shardings), 0
  else:
    state, position = (
      jax.jit(program.init, out_shardings=shardings.replace(teacher=None))(
        jax.random.key(config.seed)
      ),
      0,
    )
  if config.teacher:
    teacher = load_teacher(
      config.teacher,
      workdir,
      abstract.teacher,
      shardings.teacher,
      resumed=restored is not None,
    )
    state = state.replace(teacher=teacher)
  log_plan(config, loader, abstract, mesh, int(state.step), total_steps)
  return session.run(
    config,
    workdir,
    state,
    program.train_step,
    session.make_batches(
      config,
      loader,
      position,
      weights=[s.weight for s in config.data.sources.values()],
    ),
    mesh=mesh,
    checkpoints=checkpoints,
    position=position,
    samples_per_batch=batch_size // config.clip.num_clips,
    clips_per_step=batch_size,
    total_steps=total_steps,
    profile_steps=profile_steps,
    diagnose=diagnose,
    diagnose_every=config.diagnose_every_steps,
    evaluate=evaluate,
    evaluate_every=config.probe.every_steps if evaluate else 0,
  )


def make_loader(config: config_dict.ConfigDict) -> pipeline.SampleLoader:
  """Opens the sources and builds the mask samplers."""
  if not config.mask_names:
    raise ValueError('config.mask_names is empty: nothing would be predicted')
  samplers = []
  for name in config.mask_names:
    if name not in config.masks:
      raise ValueError(
        f'config.mask_names has {name!r}, config.masks only '
        f'{sorted(config.masks)}'
      )
    spec = config.masks[name].to_dict()
    kind = spec.pop('kind')
    try:
      samplers.append(build_mask_sampler(get_grid(config), kind, spec))
    except ValueError as error:
      raise ValueError(f'config.masks.{name}: {error}') from error
  opened = []
  for name, source in config.data.sources.items():
    if not source.path:
      raise ValueError(
        f'config.data.sources.{name}.path is empty: give a folder, a glob, a '
        'manifest, ArrayRecord shards or tfds:name/split'
      )
    options = {k: v for k, v in source.items() if k not in ('path', 'weight')}
    opened.append(sources.open_source(source.path, **options))
  return pipeline.SampleLoader(
    tuple(opened),
    pipeline.ClipOptions(**config.clip),
    tuple(samplers),
    config.seed,
  )


def make_evaluate(
  config: config_dict.ConfigDict, encoder: Encoder, mesh: Mesh
) -> Callable[[TrainState], dict[str, float]] | None:
  """Makes the online probe of the target; None if it is off."""
  probe = config.probe
  if not (probe.train and probe.test and probe.every_steps):
    return None
  options = pipeline.ClipOptions(**config.clip)
  train, test = (
    probing.load_labelled_clips(
      sources.open_source(path), options, limit=probe.max_clips
    )
    for path in (probe.train, probe.test)
  )
  return make_online_probe(
    encoder,
    mesh,
    train,
    test,
    batch_size=probe.batch_size,
    attentive_labels=probe.attentive_labels,
    attentive_steps=probe.attentive_steps,
  )


def describe(module: Encoder | Predictor) -> dict[str, Any]:
  """Returns the fields of a model as JSON, for whoever loads it later."""
  return {
    name: getattr(module, name)
    if isinstance(getattr(module, name), (int, float, str, bool, tuple))
    else jnp.dtype(getattr(module, name)).name
    for name in module.__dataclass_fields__
    if name not in ('parent', 'name')
  }


def log_plan(config, loader, abstract, mesh, start_step, total_steps) -> None:
  """Logs what is about to run, so that a mistake is seen before it costs."""
  num_parameters = {
    name: sum(x.size for x in jax.tree.leaves(tree)) / 1e6
    for name, tree in abstract.params.items()
  }
  num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
  shards = mesh.shape['fsdp']
  logging.info(
    'encoder %s %.1f M parameters, predictor %.1f M; state %.2f GiB a device',
    config.encoder.size,
    num_parameters['encoder'],
    num_parameters['predictor'],
    num_bytes / shards / 2**30,
  )
  logging.info(
    'mesh data %d x fsdp %d (%s), %d hosts',
    mesh.shape['data'],
    shards,
    mesh_lib.get_platform(mesh),
    jax.process_count(),
  )
  for name, sampler in zip(
    config.mask_names, loader.mask_samplers, strict=True
  ):
    logging.info(
      'mask %s: %d context, %d target of %d tokens, %.0f %% of draws accepted',
      name,
      sampler.context_tokens,
      sampler.target_tokens,
      sampler.grid[0] * sampler.grid[1] * sampler.grid[2],
      100 * sampler.check(),
    )
  logging.info(
    '%d videos in %d sources; steps %d to %d of %d clips',
    sum(len(s) for s in loader.sources),
    len(loader.sources),
    start_step,
    total_steps,
    config.data.batch_size,
  )
