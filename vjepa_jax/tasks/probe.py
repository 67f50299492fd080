"""Frozen evaluation: a grid of probes on features that stay as they are."""

import dataclasses
import itertools
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from vjepa_jax.data import pipeline, sources
from vjepa_jax.data.features import FeatureSource, holds_features
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation import classification
from vjepa_jax.evaluation.probe_grid import ProbeGrid, make_probe_step
from vjepa_jax.evaluation.selection import Selection
from vjepa_jax.interop.load import make_abstract
from vjepa_jax.models.encoder import Encoder, check_layers
from vjepa_jax.models.probe import AttentiveProbe, LinearProbe
from vjepa_jax.plots import training as pictures
from vjepa_jax.tasks.backbone import (
  choose_step,
  count_classes,
  describe_backbone,
  open_split,
  place_encoder,
  read_backbone,
)
from vjepa_jax.tasks.program import Program, get_compute, jit_program
from vjepa_jax.tasks.session import Session, prepare, report
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.schedules import make_schedule
from vjepa_jax.training.state import TrainState

# Test videos whose attention is drawn.
_LOOKED_AT = 6


def probe(
  config: ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
  """Trains a grid of probes, selects one on validation videos and tests it.

  The config is of `configs/probe.py`. Writes `results.json` and pictures.
  """
  start = time.perf_counter()
  config = prepare(config, workdir)
  train, validation, test = _open_splits(config)
  step = choose_step(config, workdir)
  backbone = read_backbone(config, step)
  loader, options = _make_loader(config, train)
  run = Session(config, workdir, loader, profile_steps)
  # Takes long: what is quickly found to be wrong has been.
  num_classes = config.num_classes or count_classes(train, validation, test)
  run.loader = dataclasses.replace(loader, num_classes=num_classes)
  program = _build_program(config, backbone.encoder, num_classes, run)
  grid = program.objective
  selection = Selection(
    grid,
    validation,
    options,
    mesh=run.mesh,
    batch_size=config.evaluation.batch_size,
    num_threads=config.data.num_threads,
  )

  params = None if config.random_init else backbone.encoder_params
  places = program.shardings.frozen
  frozen = place_encoder(grid.encoder, params, config.seed, places)
  model = describe_backbone(config, params, step)
  state = run.open(program, model).replace(frozen=frozen)
  del frozen  # donated with the state
  logging.info('%d probes of %d classes', len(grid.points), num_classes)
  sizes = [len(source) for source in (train, validation, test)]
  logging.info('%d training, %d validation and %d test videos', *sizes)
  every = round(config.validate_every_epochs * run.steps_per_epoch)
  state = run.train(
    state, program.train_step, evaluate=selection, evaluate_every=max(1, every)
  )
  if state is None:
    return None
  results, tested = selection.test(state, test)
  if config.knn:
    results['knn_top1'] = selection.score_knn(state, train, test, config.knn)
  results |= {
    'train_videos': len(train),
    'classes': num_classes,
    'backbone': config.backbone,
    'random_init': config.random_init,
    'seconds': time.perf_counter() - start,
  }
  report(run.workdir, results, _format(results))
  _draw(run.workdir, selection, state, test, results, tested)
  return results


def _open_splits(config: ConfigDict) -> list[sources.Source]:
  """Opens training, validation and test videos, or their features."""
  names = [n for n in ('train', 'validation', 'test') if config.data[n]]
  cached = [n for n in names if holds_features(config.data[n])]
  if cached and cached != names:
    raise UserError(
      f'config.data.{cached[0]} holds features and others hold videos: give '
      'features of all, by python -m vjepa_jax.tools.extract, or of none'
    )
  if cached:
    config.segments = 1  # all of a video's are in one record
  opened = {
    name: FeatureSource(config.data[name])
    if cached
    else open_split(config, name)
    for name in ('train', 'test', *names)
  }
  train, test = opened['train'], opened['test']
  if config.data.validation:
    return [train, opened['validation'], test]
  share = config.data.validation_share
  count = round(share * len(train))
  if not 0 < count < len(train):
    raise UserError(
      f'config.data.validation_share {share} of {len(train)} training videos '
      'leaves no video to train on, or none to select on: set '
      'config.data.validation'
    )
  order = np.random.default_rng(0).permutation(len(train))
  return [
    sources.Subset(train, np.sort(order[count:])),
    sources.Subset(train, np.sort(order[:count])),
    test,
  ]


def _make_loader(
  config: ConfigDict, train: sources.Source
) -> tuple[Any, pipeline.ClipOptions | None]:
  """Makes the loader of training clips, and says how test clips are cut.

  Of features, which are cut already, it loads those; then None says how.
  """
  if holds_features(config.data.train):
    loader = pipeline.FeatureLoader((train,), config.seed, config.num_classes)
    return loader, None
  options = pipeline.ClipOptions(**config.clip)
  options = dataclasses.replace(options, num_clips=config.segments)
  loader = pipeline.SampleLoader(
    (train,), options, (), config.seed, config.num_classes
  )
  return loader, dataclasses.replace(options, views=config.views)


def _build_program(
  config: ConfigDict, encoder: Encoder, num_classes: int, run: Session
) -> Program:
  """Builds the program that trains the probes; its objective is the grid."""
  grid = _build_grid(config, encoder, num_classes, run.mesh)
  tx = make_optimizer(**config.optimizer)
  share = make_schedule(
    'cosine', value=1.0, final=0.0, total_steps=run.total_steps
  )
  return jit_program(
    grid,
    lambda key: grid.init(key, tx),
    make_probe_step(grid, tx, share, config.probe.clip_norm),
    run.mesh,
    frozen=make_abstract(grid.encoder),
  )


def _build_grid(
  config: ConfigDict, encoder: Encoder, num_classes: int, mesh: Mesh
) -> ProbeGrid:
  """Builds the probes, for the mesh's platform."""
  compute = get_compute(config, mesh)
  options = config.probe
  heads = options.num_heads or encoder.num_heads
  if options.kind == 'linear':
    module = LinearProbe(num_classes)
  elif options.kind == 'attentive':
    if encoder.width % heads:
      raise UserError(
        f'config.probe.num_heads {heads} does not divide the {encoder.width} '
        'features of the encoder'
      )
    module = AttentiveProbe(
      num_classes, heads, options.depth, options.output_projection, **compute
    )
  else:
    raise UserError(
      f'config.probe.kind {options.kind!r} is not attentive or linear'
    )
  points = itertools.product(options.learning_rates, options.weight_decays)
  layers = config.layers
  if not layers and config.layers_of_depth:
    layers = encoder.levels or config.layers_of_depth.get(str(encoder.depth))
  if layers:
    layers = tuple(layers)
    check_layers(layers, encoder.depth, encoder.levels)
    if holds_features(config.data.train):
      raise UserError(
        f'config.layers {layers} of features that hold the last layer: give '
        'videos, or set config.layers=None and config.layers_of_depth={}'
      )
  return ProbeGrid(
    encoder.clone(remat='none', **compute),
    module,
    tuple(points),
    config.segments,
    layers,
    options.group_size,
  )


def _draw(
  workdir: epath.Path,
  selection: Selection,
  state: TrainState,
  test: sources.Source,
  results: dict[str, Any],
  tested: classification.Predictions,
) -> None:
  """Draws confusions, and where the selected probe looks; prints paths."""
  best = results['grid'].index(results['selected'])
  few = sources.Subset(test, np.arange(min(_LOOKED_AT, len(test))))
  attention = selection.attend(state, best, few)
  if jax.process_index():
    return
  path = workdir / 'confusion.png'
  predicted = tested.outputs.argmax(axis=-1)
  pictures.draw_confusion(path, tested.labels, predicted, results['classes'])
  print(f'picture: {path}')
  if attention is not None:
    videos, weights, labels = attention
    titles = [f'class {label}' for label in labels]
    path = workdir / 'attention.png'
    pictures.draw_attention(path, videos, weights, titles)
    print(f'picture: {path}')


def _format(results: dict[str, Any]) -> str:
  """Says the results in words."""
  selected = results['selected']
  lines = ['', 'learning rate  weight decay  validation top-1']
  lines += [
    f'{row["learning_rate"]:13g}  {row["weight_decay"]:12g}  '
    f'{row["validation_top1"]:16.3f}' + ('  selected' * (row == selected))
    for row in results['grid']
  ]
  encoder = 'untrained encoder' if results['random_init'] else 'frozen features'
  scores, videos = classification.describe(results)
  if 'knn_top1' in results:
    scores += f', kNN top-1 {results["knn_top1"]:.3f}'
  return '\n'.join([*lines, '', f'{encoder} on {videos}: {scores}'])
