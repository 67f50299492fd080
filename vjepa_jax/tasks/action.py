"""The action-conditioned predictor: from a backbone to a world model."""

from collections.abc import Callable
import dataclasses
import itertools
import json
import os

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from vjepa_jax.data import pipeline, storage, trajectories
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.records import Episode
from vjepa_jax.errors import UserError
from vjepa_jax.interop.layout import Weights
from vjepa_jax.interop.load import describe, make_abstract, read_weights
from vjepa_jax.models import zoo
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel import sharding
from vjepa_jax.tasks import backbone as backbones
from vjepa_jax.tasks.program import (
  Program,
  check_batch,
  get_compute,
  make_program,
  make_rate,
)
from vjepa_jax.tasks.session import Session, prepare
from vjepa_jax.training.objectives.action import ActionPrediction
from vjepa_jax.training.objectives.base import Batch
from vjepa_jax.training.schedules import make_schedule
from vjepa_jax.training.state import TrainState


def train_action(
  config: ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> TrainState | None:
  """Trains as `configs/action.py` says; returns the final state."""
  config = prepare(config, workdir)
  step = backbones.choose_step(config, workdir)
  backbone = _read_backbone(config, step)
  encoder, params = backbone.encoder, backbone.encoder_params
  loader, episode = trajectories.fit_loader(_make_loader(config))
  marks = backbones.describe_backbone(config, params, step)
  _check_features(config, marks['fingerprint'])
  run = Session(config, workdir, loader, profile_steps)
  program = build_program(
    config, run.mesh, run.total_steps, run.steps_per_epoch, encoder, episode
  )
  evaluate = _make_evaluate(config, run, program)
  model = {
    'action_predictor': describe(program.objective.predictor),
    'frozen_encoder': describe(encoder),
    **marks,
  }
  state = run.open(program, model)
  places = program.shardings.frozen
  if places is not None:
    frozen = backbones.place_encoder(encoder, params, config.seed, places)
    state = state.replace(frozen=frozen)
    del frozen  # donated with the state
  logging.info(
    'predictor %.1f M parameters on %s, states of %d numbers, %d episodes',
    sum(x.size for x in jax.tree.leaves(state.params)) / 1e6,
    config.backbone or 'an untrained encoder',
    episode.states.shape[1],
    sum(map(len, loader.sources)),
  )
  return run.train(
    state,
    program.train_step,
    evaluate=evaluate,
    evaluate_every=config.held_out.every_steps if evaluate else 0,
  )


def _read_backbone(config: ConfigDict, step: int | None) -> Weights:
  """Reads the encoder, and fills in the resolution if it is left to it."""
  if not config.backbone:
    return Weights(zoo.build_encoder(**config.encoder))
  backbone = read_weights(
    config.backbone, which=config.which, with_predictor=False, step=step
  )
  config.clip.resolution = config.clip.resolution or backbone.resolution
  if config.clip.resolution is None:
    raise UserError('the backbone does not say: set config.clip.resolution')
  return backbone


def _make_loader(config: ConfigDict) -> trajectories.TrajectoryLoader:
  """Opens the episodes."""
  for name, source in config.data.sources.items():
    if not source.path:
      raise UserError(
        f'config.data.sources.{name}.path is empty: give a folder of episodes'
      )
  return trajectories.TrajectoryLoader(
    tuple(
      trajectories.open_trajectories(source.path, source.camera)
      for source in config.data.sources.values()
    ),
    ClipOptions(**config.clip),
    config.seed,
    config.state_kind,
    config.extrinsics,
  )


def _check_features(config: ConfigDict, fingerprint: str) -> None:
  """Raises UserError if episodes have features of another encoder."""
  for source in config.data.sources.values():
    path = os.path.join(source.path, trajectories.PREPARED)
    if not storage.exists(path):
      continue
    mark = json.loads(storage.read(path)).get('encoder_sha256', fingerprint)
    if mark != fingerprint:
      raise UserError(
        f'{source.path} has features of another encoder than '
        f'{config.backbone or "an untrained one"}: set the config.backbone '
        'that they were made with'
      )


def build_program(
  config: ConfigDict,
  mesh: Mesh,
  total_steps: int,
  steps_per_epoch: float,
  encoder: Encoder,
  episode: Episode,
) -> Program:
  """Puts a predictor on an encoder, which is frozen, or on its features.

  Args:
    config: See `configs/action.py`.
    mesh: Devices, attached or not.
    total_steps, steps_per_epoch: Of the schedules.
    encoder: The backbone.
    episode: Any one, for its sizes.

  Raises:
    UserError: They do not fit together.
  """
  encoder = encoder.clone(remat='none', **get_compute(config, mesh))
  has_features = isinstance(episode.video, np.ndarray)
  if has_features and episode.video.shape[-1] != encoder.width:
    raise UserError(
      f'the episodes have features of {episode.video.shape[-1]} numbers, '
      f'{config.backbone or "config.encoder"} gives {encoder.width}: they are '
      'those of another encoder'
    )
  size = episode.states.shape[1]
  recorded = config.state_kind == 'hidden'
  predictor = zoo.build_action_predictor(
    encoder,
    action_dim=episode.actions.shape[1] if recorded else size,
    state_dim=size,
    extrinsics_dim=episode.extrinsics.shape[1] if config.extrinsics else 0,
    remat=config.remat,
    **config.predictor,
  )
  objective = ActionPrediction(
    encoder, predictor, seed=config.seed, **config.objective
  )
  schedules = {
    'learning_rate': make_rate(config, total_steps, steps_per_epoch, offset=1),
    'weight_decay': make_schedule(
      'constant', value=config.weight_decay, total_steps=total_steps
    ),
  }
  frozen = None if has_features else make_abstract(encoder)
  return make_program(config, objective, schedules, mesh, frozen)


def build_abstract(
  config: ConfigDict, mesh: Mesh, total_steps: int, steps_per_epoch: float
) -> tuple[Program, Batch]:
  """Builds the program, and the shapes of a batch, without data and backbone.

  The encoder is that of the config; states are poses with a gripper.
  """
  clip, rows = config.clip, config.data.batch_size
  check_batch(config, mesh, rows)
  states = np.zeros((1, 7), np.float32)
  episode = Episode('', states, np.zeros(1), '', states[:, :6], states)
  encoder = zoo.build_encoder(**config.encoder)
  program = build_program(
    config, mesh, total_steps, steps_per_epoch, encoder, episode
  )
  sides = clip.resolution, clip.resolution, 3
  shapes = {'states': (clip.frames, 7), 'actions': (clip.frames - 1, 7)}
  if config.extrinsics:
    shapes['extrinsics'] = clip.frames, 6
  stream = {
    name: jax.ShapeDtypeStruct((rows, *shape), np.float32)
    for name, shape in shapes.items()
  }
  frames = (rows, clip.frames, *sides)
  stream['pixels'] = jax.ShapeDtypeStruct(frames, np.uint8)
  return program, {'video': stream}


def _make_evaluate(
  config: ConfigDict, run: Session, program: Program
) -> Callable[[TrainState], dict[str, float]] | None:
  """Makes the loss on the held-out episodes, always of the same clips."""
  path = config.held_out.path
  if not path:
    return None
  camera = next(iter(config.data.sources.values())).camera
  source = trajectories.open_trajectories(path, camera)
  loader = dataclasses.replace(run.loader, sources=(source,))
  batches = pipeline.make_batches(
    trajectories.fit_loader(loader)[0],
    weights=[1.0],
    batch_size=config.data.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
  )
  measure = jax.jit(
    lambda params, frozen, batch: program.objective.loss(params, frozen, batch),
    out_shardings=sharding.replicate(run.mesh),
  )

  def evaluate(state: TrainState) -> dict[str, float]:
    found = []
    for batch in itertools.islice(batches, config.held_out.batches):
      del batch['failures']
      batch = sharding.make_global(batch, program.batch_sharding)
      found.append(measure(state.params, state.frozen, batch)[1])
    mean = jax.tree.map(lambda *x: float(np.mean(x)), *found)
    return {f'held_out_{name}': value for name, value in mean.items()}

  return evaluate
