"""The feature decoder: from a backbone to a decoder of its features."""

import itertools
import math
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vjepa_jax.data import pipeline, sources
from vjepa_jax.data.clip import load_clips
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation.batching import make_extract
from vjepa_jax.interop.load import describe
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.models.decoder import FeatureDecoder
from vjepa_jax.plots import prediction as pictures
from vjepa_jax.progress import make_bar
from vjepa_jax.tasks.backbone import choose_step, describe_backbone, place
from vjepa_jax.tasks.program import get_compute, make_program, make_schedules
from vjepa_jax.tasks.session import (
  Session,
  adapt_to_sources,
  open_sources,
  prepare,
  report,
)
from vjepa_jax.world import decoding
from vjepa_jax.world.model import (
  TargetSpace,
  WorldModel,
  complete_clip,
  measure_space,
)


def train_decoder(
  config: ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
  """Trains the decoder of `configs/decoder.py`.

  Writes `results.json` and `decoder.png`.
  """
  config = prepare(config, workdir)
  step = choose_step(config, workdir)
  world = _load_world(config, step)
  loader = _make_loader(config, world)
  world = world._replace(frames=loader.options.frames)
  run = Session(config, workdir, loader, profile_steps)
  models = _build(config, run.mesh, world)
  clip = loader.options
  grid = world.get_grid((1, clip.frames, clip.resolution, clip.resolution, 3))
  backbone = describe_backbone(config, world.params['target'], step)
  space = _measure_or_read(config, run, world, backbone['fingerprint'])
  frozen = decoding.pack_frozen(world, space)
  program = make_program(
    config,
    models,
    make_schedules(config, run.total_steps, run.steps_per_epoch),
    run.mesh,
    jax.eval_shape(lambda x: x, frozen),
  )
  frozen = jax.tree.map(place, frozen, program.shardings.frozen)
  held_out = _make_held_out(config, run.mesh, models, frozen, loader)
  model = {
    'decoder': describe(models.decoder),
    'grid': list(grid),
    **backbone,
  }
  state = run.open(program, model).replace(frozen=frozen)
  del frozen  # donated with the state
  count = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
  logging.info('decoder %.1f M parameters of %s', count, config.backbone)
  state = run.train(
    state,
    program.train_step,
    evaluate=held_out,
    evaluate_every=config.held_out.every_steps,
  )
  if state is None:
    return None
  is_held_out = bool(config.held_out.path or world.held_out)
  return _report(run, held_out, state.target, is_held_out)


def _load_world(config: ConfigDict, step: int | None) -> WorldModel:
  """Loads the backbone; its predictions must be features of whole clips."""
  path = config.backbone
  if not path:
    raise UserError(
      'config.backbone is empty: give a workdir of pretraining, a Hugging Face '
      'folder or an official file'
    )
  world = load_world_model(path, step=step)
  if world.targets == 'pixels':
    raise UserError(f'{path} predicts pixels: there is nothing to decode')
  if world.target_view == 'targets':
    raise UserError(
      f"{path} has objective.vjepa.target_view='targets': its features depend "
      'on what else is hidden, and no decoder fits them'
    )
  return world


def _make_loader(
  config: ConfigDict, world: WorldModel
) -> pipeline.SampleLoader:
  """Opens the sources of the config, or those of the backbone; no masks."""
  given = [dict(s) for s in config.data.sources.values() if s['path']]
  given = given or [dict(source) for source in world.sources]
  if not given:
    raise UserError(
      f'{config.backbone} does not say what it was trained on: give '
      '--config.data.sources.videos.path'
    )
  config.data.sources = {f'source{i}': s for i, s in enumerate(given)}
  try:
    options = complete_clip(world, **config.clip)
  except ValueError as error:
    raise UserError(f'config.clip: {error}') from None
  return pipeline.SampleLoader(
    open_sources(config.data),
    options,
    (),
    config.seed,
    source_options=adapt_to_sources(config.data, options),
  )


def _measure_or_read(
  config: ConfigDict, run: Session, world: WorldModel, fingerprint: str
) -> TargetSpace:
  """Measures the space of features, for all of a run the same."""
  space = decoding.read_space(run.workdir, fingerprint)
  if space is not None:
    return space
  count = max(1, config.statistics_clips // config.data.batch_size)
  # Every host reads the same clips, the first of the run.
  batches = itertools.islice(run.make_batches(0, whole=True), count)
  batches = make_bar(
    batches, total=count, desc='statistics of features', leave=False
  )
  space = measure_space(world, (b['video']['pixels'] for b in batches))
  if jax.process_index() == 0:
    run.workdir.mkdir(parents=True, exist_ok=True)
    decoding.save_space(run.workdir, space, fingerprint)
  return space


def _build(
  config: ConfigDict, mesh: Mesh, world: WorldModel
) -> decoding.Decoding:
  """Builds the decoder, and the encoder for the platform of the mesh."""
  compute = get_compute(config, mesh)
  decoder = FeatureDecoder(
    out_width=3 * math.prod(world.tubelet), **compute, **config.decoder
  )
  if decoder.width % decoder.num_heads:
    raise UserError(
      f'decoder width {decoder.width} is not divisible by its '
      f'{decoder.num_heads} heads'
    )
  if config.loss_exp not in (1, 2):
    raise UserError(f'config.loss_exp is 1 or 2, not {config.loss_exp}')
  encoder = world.target_encoder.clone(**compute)
  stripped = world._replace(target_encoder=encoder, params={})
  return decoding.Decoding(stripped, decoder, config.loss_exp)


def _make_held_out(
  config: ConfigDict,
  mesh: Mesh,
  models: decoding.Decoding,
  frozen: Any,
  loader: pipeline.SampleLoader,
) -> decoding.HeldOut:
  """Reads held-out clips and encodes them, once."""
  path = config.held_out.path or models.world.held_out
  if not path:
    logging.warning(
      'no held-out videos: PSNR is of training videos; '
      'config.held_out.path names others'
    )
  source = sources.open_source(path) if path else loader.sources[0]
  clips = load_clips(source, loader.options, limit=config.held_out.max_clips)
  grid = models.world.get_grid(clips.videos.shape)

  def run(apply):
    size = config.held_out.batch_size
    return make_extract(apply, mesh, size, 'config.held_out.batch_size')

  encoder, encode = models.world.target_encoder, run(models.encode)
  decode = run(lambda p, x: models.decoder.apply({'params': p}, x, grid))
  features = encode(frozen, clips.videos)
  return decoding.HeldOut(encoder, clips.videos, features, decode)


def _report(
  run: Session, held_out: decoding.HeldOut, target: Any, is_held_out: bool
) -> dict[str, Any]:
  """Writes the numbers and the picture, and prints where they are."""
  decoded = held_out.reconstruct(target)
  results = held_out.score(decoded) | {
    'clips': len(decoded),
    'held_out': is_held_out,
  }
  ours, colour = results['decoded_psnr'], results['mean_colour_psnr']
  text = (
    f'PSNR of {len(decoded)} {"held-out" if is_held_out else "seen"} clips '
    f'decoded from their features: {ours["mean"]:.2f} dB (mean colour of the '
    f'clip: {colour["mean"]:.2f} dB)'
  )
  report(run.workdir, results, text)
  if jax.process_index() == 0:
    picture = run.workdir / 'decoder.png'
    pictures.draw_reconstructions(
      picture, held_out.videos, decoded, held_out.encoder.tubelet[0]
    )
    print(f'picture: {picture}')
  return results
