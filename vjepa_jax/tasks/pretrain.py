"""Pretraining: from a config to a trained encoder."""

from collections.abc import Callable
import dataclasses
import math

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vjepa_jax.data import pipeline, sources
from vjepa_jax.data.clip import Clips, load_clips
from vjepa_jax.data.readers import open_journal
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation.online import make_online_probe
from vjepa_jax.interop.load import describe
from vjepa_jax.masks.fixed_size import MaskSampler, build_mask_sampler
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.tasks.program import (
  Program,
  build_program,
  get_grid,
  list_streams,
)
from vjepa_jax.tasks.session import (
  Session,
  adapt_to_sources,
  open_sources,
  prepare,
)
from vjepa_jax.tasks.teacher import load_teacher, name_teacher
from vjepa_jax.training.diagnostics import make_diagnose
from vjepa_jax.training.state import TrainState

_IMAGE_SEED = 2**20
# Fields of config.image that say how images are cut.
_IMAGE_OPTIONS = 'resolution', 'crop_scale', 'crop_aspect_ratio', 'flip'


def pretrain(
  config: ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> TrainState | None:
  """Pretrains as `configs/base.py` says; returns the final state."""
  config = prepare(config, workdir)
  loaders = {name: make_loader(config, name) for name in list_streams(config)}
  run = Session(
    config, workdir, loaders['video'], profile_steps, loaders.get('image')
  )
  program = build_program(
    config, run.mesh, run.total_steps, run.steps_per_epoch
  )
  objective, encoder = program.objective, program.objective.encoder
  diagnose = jax.jit(
    make_diagnose(encoder, config.microbatches),
    out_shardings=sharding.replicate(run.mesh),
  )
  evaluate = make_evaluate(config, encoder, run)
  modules = program.abstract.params
  model = {name: describe(getattr(objective, name)) for name in modules}
  state = run.open(program, model)
  if objective.teacher is not None:
    frozen = load_teacher(
      objective.teacher.path,
      name_teacher(config),
      run.workdir,
      program.abstract.frozen,
      program.shardings.frozen,
      resumed=run.resumed,
    )
    state = state.replace(frozen=frozen)
  log_plan(config, loaders, program, run.mesh)
  return run.train(
    state,
    program.train_step,
    diagnose=diagnose,
    diagnose_every=config.diagnose_every_steps,
    evaluate=evaluate,
    evaluate_every=config.probe.every_steps if evaluate else 0,
  )


def make_loader(
  config: ConfigDict, stream: str = 'video'
) -> pipeline.SampleLoader:
  """Opens the sources of a stream and builds its mask samplers."""
  seed, options = config.seed, pipeline.ClipOptions(**config.clip)
  group = list_streams(config)[stream].group
  if stream == 'image':
    # Another seed: where both are at the same position crops would be alike.
    seed += _IMAGE_SEED
    image = {name: config.image[name] for name in _IMAGE_OPTIONS}
    options = dataclasses.replace(
      options, frames=1, frame_step=1, fps=None, num_clips=1, **image
    )
  _check_sources(config[group].sources, f'config.{group}.sources')
  return pipeline.SampleLoader(
    open_sources(config[group]),
    options,
    _build_samplers(config, stream),
    seed,
    source_options=adapt_to_sources(config[group], options),
    name=stream,
  )


def _build_samplers(config: ConfigDict, stream: str) -> tuple[MaskSampler, ...]:
  """Builds the mask samplers of a stream."""
  names, samplers = list_streams(config)[stream].mask_names, []
  field = f'config.{"image." * (stream == "image")}mask_names'
  if not names:
    raise UserError(f'{field} is empty: nothing would be predicted')
  for name in names:
    if name not in config.masks:
      raise UserError(
        f'{field} has {name!r}, config.masks only {sorted(config.masks)}'
      )
    spec = config.masks[name].to_dict()
    kind = spec.pop('kind')
    try:
      samplers.append(build_mask_sampler(get_grid(config, stream), kind, spec))
    except ValueError as error:
      raise UserError(f'config.masks.{name}: {error}') from error
  return tuple(samplers)


def _check_sources(sources: ConfigDict, field: str) -> None:
  """Raises UserError where a source has no path or no weight."""
  for name, source in sources.items():
    if not source.path:
      raise UserError(
        f'{field}.{name}.path is empty: give a folder, a glob, a manifest, '
        'ArrayRecord shards or tfds:name/split'
      )
    if not 0 < source.weight < math.inf:
      raise UserError(
        f'{field}.{name}.weight {source.weight} is no positive number: a '
        'source that is not wanted is left out'
      )


def make_evaluate(
  config: ConfigDict, encoder: Encoder, run: Session
) -> Callable[[TrainState], dict[str, float]] | None:
  """Makes the online probe of the target; None if it is off."""
  probe = config.probe
  if not (probe.train and probe.test and probe.every_steps):
    return None
  return make_online_probe(
    encoder,
    run.mesh,
    sources.open_source(probe.train),
    sources.open_source(probe.test),
    pipeline.ClipOptions(**config.clip),
    batch_size=probe.batch_size,
    max_clips=probe.max_clips,
    attentive_labels=probe.attentive_labels,
    attentive_steps=probe.attentive_steps,
    num_threads=config.data.num_threads,
    journals=tuple(
      open_journal(str(run.workdir), jax.process_index(), f'{part}-')
      for part in ('train', 'test')
    ),
  )


def load_probe_clips(config: ConfigDict, limit: int) -> tuple[Clips, Clips]:
  """Decodes labelled clips to train probes on, and to test them."""
  options = pipeline.ClipOptions(**config.clip)
  return tuple(
    load_clips(sources.open_source(path), options, limit=limit, labelled=True)
    for path in (config.probe.train, config.probe.test)
  )


def log_plan(config, loaders, program: Program, mesh: Mesh) -> None:
  """Logs what is about to run, so that a mistake is seen before it costs."""
  millions = {
    name: sum(x.size for x in jax.tree.leaves(tree)) / 1e6
    for name, tree in program.abstract.params.items()
  }
  num_bytes = sharding.count_bytes(program.abstract, program.shardings)
  logging.info(
    'encoder %s; %s; state %.2f GiB a device',
    config.encoder.size,
    ', '.join(f'{k} {v:.1f} M parameters' for k, v in millions.items()),
    num_bytes / 2**30,
  )
  logging.info(
    'mesh data %d x fsdp %d (%s), %d hosts',
    *mesh.shape.values(),
    mesh_lib.get_platform(mesh),
    jax.process_count(),
  )
  for stream, loader in loaders.items():
    names = list_streams(config)[stream].mask_names
    for name, sampler in zip(names, loader.mask_samplers, strict=True):
      logging.info(
        'mask %s: %d context, %d target of %d tokens, %.0f %% of draws '
        'accepted',
        name,
        sampler.context_tokens,
        sampler.target_tokens,
        math.prod(sampler.grid),
        100 * sampler.check(),
      )
    lengths = [len(source) for source in loader.sources]
    logging.info('%d %ss in %d sources', sum(lengths), stream, len(lengths))
