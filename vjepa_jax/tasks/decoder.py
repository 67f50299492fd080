"""The feature decoder: from a backbone to a decoder of its features."""

import itertools
import json
import math
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict
import numpy as np
import optax

from vjepa_jax.data import pipeline, sources
from vjepa_jax.data.clip import load_clips
from vjepa_jax.evaluation.batching import make_extract
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.models.attention import choose_attention
from vjepa_jax.models.decoder import FeatureDecoder
from vjepa_jax.models.tubelets import unpatchify
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.plots import prediction as pictures
from vjepa_jax.progress import make_bar
from vjepa_jax.tasks import session
from vjepa_jax.tasks.pretrain import describe
from vjepa_jax.tasks.program import get_steps, make_schedules
from vjepa_jax.training.checkpoint import Checkpoints, write_config
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.step import make_train_step
from vjepa_jax.world import decoding
from vjepa_jax.world import predict as imagination
from vjepa_jax.world.model import (
  TargetSpace,
  WorldModel,
  complete_clip,
  measure_space,
  normalize_visible,
)


def train_decoder(
  config: config_dict.ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
  """Trains a decoder, or resumes; writes `results.json` and `decoder.png`.

  Args:
    config: `configs/decoder.py`.
    workdir: Directory of the run, shared by all hosts.
    profile_steps: First and last step to trace.

  Returns:
    What `results.json` holds; None if the platform took the machine back.

  Raises:
    ValueError: The config does not fit together, or the backbone has nothing to
      decode; before anything is compiled.
  """
  workdir = epath.Path(workdir)
  if not config.backbone:
    raise ValueError(
      'config.backbone is empty: give a workdir of pretraining, a Hugging Face '
      'folder or an official file'
    )
  world = load_world_model(config.backbone)
  _check_backbone(config.backbone, world)
  mesh = mesh_lib.make_mesh(config.fsdp)
  loader = _make_loader(config, world)
  batch_size = config.data.batch_size
  if batch_size % (mesh.devices.size * config.microbatches):
    raise ValueError(
      f'batch size {batch_size} is not divisible by {mesh.devices.size} data '
      f'shards x {config.microbatches} microbatches: change '
      'config.data.batch_size'
    )
  steps_per_epoch = sum(len(s) for s in loader.sources) / batch_size
  total_steps = get_steps(config, 'total', steps_per_epoch)
  write_config(workdir, config)
  space = _measure_or_read(config, workdir, world, loader)
  models = _build(config, mesh, world, space)
  grid = world.get_grid((1, *_get_sides(loader.options)))
  tx = optax.scale_by_adam(**config.optimizer)

  def init(key):
    return decoding.init_decoder_state(
      key, models.decoder, tx, space.mean.shape[-1], grid
    )

  frozen = decoding.pack_frozen(world, space)
  abstract = jax.eval_shape(init, jax.random.key(config.seed))
  shardings = sharding.shard_tree(abstract, mesh)
  frozen_shardings = sharding.shard_tree(frozen, mesh)
  rows = sharding.shard_batch(mesh)
  train_step = jax.jit(
    make_train_step(
      models,
      tx,
      make_schedules(config, total_steps, steps_per_epoch),
      clip_norm=config.clip_norm,
      clip_start_step=config.clip_start_step,
      microbatches=config.microbatches,
      loss=decoding.compute_decoder_loss,
      averaged='decoder',
    ),
    donate_argnums=0,
    in_shardings=(shardings.replace(teacher=frozen_shardings), rows),
    out_shardings=(
      shardings.replace(teacher=frozen_shardings),
      sharding.replicate(mesh),
    ),
  )

  checkpoints = Checkpoints(
    workdir,
    model={
      'decoder': _describe(models.decoder),
      'grid': list(grid),
      'backbone': config.backbone,
      'fingerprint': decoding.compute_fingerprint(world),
    },
    **config.checkpoint,
  )
  frozen = jax.device_put(frozen, frozen_shardings)
  evaluate = _HeldOut(config, mesh, models, frozen, grid, loader)
  restored = checkpoints.restore(abstract, shardings)
  if restored is not None:
    state, position = restored
  else:
    init = jax.jit(init, out_shardings=shardings)
    state, position = init(jax.random.key(config.seed)), 0
  state = state.replace(teacher=frozen)
  del frozen
  count = sum(x.size for x in jax.tree.leaves(abstract.params)) / 1e6
  logging.info('decoder %.1f M parameters of %s', count, config.backbone)
  state = session.run(
    config,
    workdir,
    state,
    train_step,
    _make_batches(config, loader, position),
    mesh=mesh,
    checkpoints=checkpoints,
    position=position,
    samples_per_batch=batch_size // loader.options.num_clips,
    clips_per_step=batch_size,
    total_steps=total_steps,
    profile_steps=profile_steps,
    evaluate=evaluate,
    evaluate_every=config.held_out.every_steps,
  )
  return None if state is None else evaluate.report(workdir, state.target)


def _check_backbone(path: str, world: WorldModel) -> None:
  """Refuses backbones whose predictions are no features of whole clips."""
  if world.targets == 'pixels':
    raise ValueError(f'{path} predicts pixels: there is nothing to decode')
  if world.target_view == 'targets':
    raise ValueError(
      f"{path} has objective.target_view='targets': its features depend on "
      'what else is hidden, and no decoder fits them'
    )


def _make_loader(
  config: config_dict.ConfigDict, world: WorldModel
) -> pipeline.SampleLoader:
  """Opens the sources of the config, or those of the backbone; no masks."""
  given = [dict(s) for s in config.data.sources.values() if s['path']]
  chosen = given or [dict(source) for source in world.sources]
  if not chosen:
    raise ValueError(
      f'{config.backbone} does not say what it was trained on: give '
      '--config.data.sources.videos.path'
    )
  config.data.sources = {f'source{i}': s for i, s in enumerate(chosen)}
  try:
    options = complete_clip(world, **config.clip)
  except ValueError as error:
    raise ValueError(f'config.clip: {error}') from None
  opened = []
  for source in chosen:
    others = {k: v for k, v in source.items() if k not in ('path', 'weight')}
    opened.append(sources.open_source(source['path'], **others))
  return pipeline.SampleLoader(tuple(opened), options, (), config.seed)


def _get_sides(options: pipeline.ClipOptions) -> tuple[int, int, int, int]:
  return options.frames, options.resolution, options.resolution, 3


def _make_batches(config, loader, position, whole=False):
  return session.make_batches(
    config,
    loader,
    position,
    weights=[s.weight for s in config.data.sources.values()],
    whole=whole,
  )


def _measure_or_read(
  config: config_dict.ConfigDict,
  workdir: epath.Path,
  world: WorldModel,
  loader: pipeline.SampleLoader,
) -> TargetSpace:
  """Measures the space of features, for all of a run the same."""
  space = decoding.read_space(workdir)
  if space is not None:
    return space
  count = max(1, config.statistics_clips // config.data.batch_size)
  # Every host reads the same clips, the first of the run.
  batches = itertools.islice(
    _make_batches(config, loader, 0, whole=True), count
  )
  space = measure_space(
    world,
    (
      batch['video']['pixels']
      for batch in make_bar(
        batches, total=count, desc='statistics of features', leave=False
      )
    ),
  )
  if jax.process_index() == 0:
    decoding.save_space(workdir, space)
  return space


def _build(
  config: config_dict.ConfigDict,
  mesh: Mesh,
  world: WorldModel,
  space: TargetSpace,
) -> decoding.Decoding:
  """Builds the decoder, and the encoder for the platform of the mesh."""
  dtype = jnp.dtype(config.compute_dtype)
  attention = config.attention
  if attention == 'auto':
    attention = choose_attention(mesh_lib.get_platform(mesh), dtype)
  decoder = FeatureDecoder(
    out_width=3 * math.prod(world.tubelet),
    attention=attention,
    dtype=dtype,
    **config.decoder,
  )
  if decoder.width % decoder.num_heads:
    raise ValueError(
      f'decoder width {decoder.width} is not divisible by its '
      f'{decoder.num_heads} heads'
    )
  if config.loss_exp not in (1, 2):
    raise ValueError(f'config.loss_exp is 1 or 2, not {config.loss_exp}')
  encoder = world.target_encoder.clone(dtype=dtype, attention=attention)
  world = world._replace(target_encoder=encoder, params={})
  return decoding.Decoding(world, decoder, space.norm, config.loss_exp)


def _describe(decoder: FeatureDecoder) -> dict[str, Any]:
  """Returns the fields that tell how to use it, not how it was run."""
  fields = describe(decoder)
  return {k: v for k, v in fields.items() if k not in ('attention', 'dtype')}


class _HeldOut:
  """Decodes held-out clips: PSNR during the run, a picture after it."""

  def __init__(
    self,
    config: config_dict.ConfigDict,
    mesh: Mesh,
    models: decoding.Decoding,
    frozen: Any,
    grid: tuple[int, int, int],
    loader: pipeline.SampleLoader,
  ):
    """Reads the clips and encodes them, once."""
    path = config.held_out.path or models.world.held_out
    source = sources.open_source(path) if path else loader.sources[0]
    if not path:
      logging.warning(
        'no held-out videos: PSNR is of training videos; '
        'config.held_out.path names others'
      )
    self._is_held_out = bool(path)
    clips = load_clips(source, loader.options, limit=config.held_out.max_clips)
    self._videos = clips.videos
    self._models, self._grid = models, grid

    def run(apply):
      return make_extract(
        apply,
        mesh,
        config.held_out.batch_size,
        'config.held_out.batch_size',
      )

    encode = run(
      lambda params, video: decoding.encode_frozen(models, params, video)
    )
    self._decode = run(
      lambda params, features: models.decoder.apply(
        {'params': params}, features, grid
      )
    )
    self._features = encode(frozen, self._videos)

  def reconstruct(self, target: Any) -> np.ndarray:
    """Decodes the clips: float32 `[n, frames, h, w, 3]`, 0..255."""
    encoder = self._models.world.target_encoder
    every = np.arange(math.prod(self._grid))
    pixels = normalize_visible(encoder, self._videos, every)
    decoded = self._decode(target, self._features)
    return np.asarray(
      pixels.restore(unpatchify(decoded, self._grid, encoder.tubelet))
    )

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Computes the mean PSNR, for the loop."""
    return {'psnr': float(self._score(self.reconstruct(state.target)).mean())}

  def _score(self, decoded):
    every = np.arange(math.prod(self._grid))
    tubelet = self._models.world.tubelet
    return imagination.score_pixels(decoded, self._videos, every, tubelet)

  def report(self, workdir: epath.Path, target: Any) -> dict[str, Any]:
    """Writes the numbers and the picture, and prints where they are."""
    decoded = self.reconstruct(target)
    mean = self._videos.mean(axis=(1, 2, 3), keepdims=True)
    scores = {
      'decoded_psnr': self._score(decoded),
      'mean_colour_psnr': self._score(np.broadcast_to(mean, decoded.shape)),
    }
    results = {
      **{name: imagination.summarize(x) for name, x in scores.items()},
      'clips': len(self._videos),
      'held_out': self._is_held_out,
    }
    if jax.process_index() == 0:
      (workdir / 'results.json').write_text(
        json.dumps(results, indent=2) + '\n'
      )
      pictures.draw_reconstructions(
        workdir / 'decoder.png',
        self._videos,
        decoded,
        self._models.world.tubelet[0],
      )
      print(
        f'PSNR of {len(decoded)} {"held-out" if self._is_held_out else "seen"} '
        f'clips decoded from their features: '
        f'{results["decoded_psnr"]["mean"]:.2f} dB (mean colour of the clip: '
        f'{results["mean_colour_psnr"]["mean"]:.2f} dB)\n'
        f'picture: {workdir / "decoder.png"}\n'
        f'results: {workdir / "results.json"}'
      )
    return results
