"""Frozen evaluation: a grid of probes on features that stay as they are."""

import dataclasses
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import config_dict
import numpy as np

from vjepa_jax.data import pipeline, sources
from vjepa_jax.data.features import (
  FeatureLoader,
  FeatureSource,
  holds_features,
)
from vjepa_jax.evaluation.classification import Predictions
from vjepa_jax.evaluation.probe_grid import (
  ProbeGrid,
  make_points,
  make_probe_step,
)
from vjepa_jax.evaluation.selection import Selection
from vjepa_jax.interop.load import make_abstract
from vjepa_jax.models.encoder import Encoder, check_layers
from vjepa_jax.models.probe import AttentiveProbe, LinearProbe
from vjepa_jax.plots import training as pictures
from vjepa_jax.tasks.backbone import (
  count_classes,
  open_split,
  place_encoder,
  read_backbone,
)
from vjepa_jax.tasks.program import Program, get_compute, make_program
from vjepa_jax.tasks.session import Session, prepare
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.schedules import make_schedule
from vjepa_jax.training.state import TrainState

# Test videos whose attention is drawn.
_LOOKED_AT = 6


def probe(
  config: config_dict.ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
  """Trains a grid of probes, selects one on validation videos and tests it.

  Args:
    config: See `configs/probe.py`.
    workdir: Directory of the run, shared by all hosts; an interrupted run
      resumes there.
    profile_steps: First and last step to trace.

  Returns:
    What `results.json` holds; None if the platform took the machine back.

  Raises:
    ValueError: The config does not fit together; before anything is compiled.
  """
  start = time.perf_counter()
  config = prepare(config, workdir)
  train, validation, test = _open_splits(config)
  backbone = read_backbone(config)
  run = Session(
    config,
    workdir,
    len(train),
    clips_per_step=config.data.batch_size * config.segments,
    clips_per_video=config.segments,
    profile_steps=profile_steps,
  )
  num_classes = config.num_classes or count_classes(train, validation, test)
  program = _build_program(config, backbone.encoder, num_classes, run)
  grid = program.objective
  loader, options = _make_loader(config, train, num_classes)
  selection = Selection(
    grid,
    run.mesh,
    validation,
    options,
    batch_size=config.evaluation.batch_size,
    num_threads=config.data.num_threads,
  )

  params = None if config.random_init else backbone.encoder_params
  places = program.shardings.frozen
  frozen = place_encoder(grid.encoder, params, config.seed, places)
  state = run.open(program).replace(frozen=frozen)
  del frozen  # donated with the state
  logging.info('%d probes of %d classes', len(grid.points), num_classes)
  sizes = [len(source) for source in (train, validation, test)]
  logging.info('%d training, %d validation and %d test videos', *sizes)
  every = round(config.validate_every_epochs * run.steps_per_epoch)
  state = run.train(
    state,
    program.train_step,
    loader,
    evaluate=selection,
    evaluate_every=max(1, every),
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
  run.write_results(results)
  _draw(run.workdir, selection, state, test, results, tested)
  if jax.process_index() == 0:
    print(_format(results, run.workdir))
  return results


def _open_splits(config: config_dict.ConfigDict) -> list[sources.Source]:
  """Opens training, validation and test videos, or their features."""
  names = [n for n in ('train', 'validation', 'test') if config.data[n]]
  cached = [n for n in names if holds_features(config.data[n])]
  if cached and cached != names:
    raise ValueError(
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
    raise ValueError(
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
  config: config_dict.ConfigDict, train: sources.Source, num_classes: int
) -> tuple[Any, pipeline.ClipOptions | None]:
  """Makes the loader of training clips, and says how test clips are cut.

  Of features, which are cut already, it loads those; then None says how.
  """
  if holds_features(config.data.train):
    return FeatureLoader((train,), config.seed, num_classes), None
  options = pipeline.ClipOptions(**config.clip)
  options = dataclasses.replace(options, num_clips=config.segments)
  loader = pipeline.SampleLoader(
    (train,), options, (), config.seed, num_classes
  )
  return loader, dataclasses.replace(options, views=config.views)


def _build_program(
  config: config_dict.ConfigDict,
  encoder: Encoder,
  num_classes: int,
  run: Session,
) -> Program:
  """Builds the program that trains the probes; its objective is the grid."""
  grid = _build_grid(config, encoder, num_classes, run.mesh)
  tx = make_optimizer(**config.optimizer)
  train_step = make_probe_step(
    grid,
    tx,
    make_schedule('cosine', value=1.0, final=0.0, total_steps=run.total_steps),
    config.probe.clip_norm,
  )
  return make_program(
    grid,
    lambda key: grid.init(key, tx),
    train_step,
    run.mesh,
    frozen=make_abstract(grid.encoder),
  )


def _build_grid(
  config: config_dict.ConfigDict, encoder: Encoder, num_classes: int, mesh: Mesh
) -> ProbeGrid:
  """Builds the probes, for the mesh's platform."""
  compute = get_compute(config, mesh)
  options = config.probe
  heads = options.num_heads or encoder.num_heads
  if options.kind == 'linear':
    module = LinearProbe(num_classes)
  elif options.kind == 'attentive':
    if encoder.width % heads:
      raise ValueError(
        f'config.probe.num_heads {heads} does not divide the {encoder.width} '
        'features of the encoder'
      )
    module = AttentiveProbe(
      num_classes, heads, options.depth, options.output_projection, **compute
    )
  else:
    raise ValueError(
      f'config.probe.kind {options.kind!r} is not attentive or linear'
    )
  points = make_points(
    tuple(options.learning_rates), tuple(options.weight_decays)
  )
  layers = config.layers or config.layers_of_depth.get(str(encoder.depth))
  if layers:
    layers = tuple(layers)
    check_layers(layers, encoder.depth)
    if holds_features(config.data.train):
      raise ValueError(
        f'config.layers {layers} of features that hold the last layer: give '
        'videos, or set config.layers=None and config.layers_of_depth={}'
      )
  encoder = encoder.clone(remat='none', **compute)
  return ProbeGrid(
    encoder, module, points, config.segments, layers, options.group_size
  )


def _draw(
  workdir: epath.Path,
  selection: Selection,
  state: TrainState,
  test: sources.Source,
  results: dict[str, Any],
  tested: Predictions,
) -> None:
  """Draws confusions, and where the selected probe looks."""
  best = results['grid'].index(results['selected'])
  few = sources.Subset(test, np.arange(min(_LOOKED_AT, len(test))))
  attention = selection.attend(state, best, few)
  if jax.process_index():
    return
  predicted = tested.probabilities.argmax(axis=-1)
  pictures.draw_confusion(
    workdir / 'confusion.png', tested.labels, predicted, results['classes']
  )
  if attention is not None:
    pictures.draw_attention(
      workdir / 'attention.png',
      attention.videos,
      attention.weights,
      [f'class {label}' for label in attention.labels],
    )


def _format(results: dict[str, Any], workdir: epath.Path) -> str:
  """Says the results in words."""
  selected = results['selected']
  lines = ['', 'learning rate  weight decay  validation top-1']
  lines += [
    f'{row["learning_rate"]:13g}  {row["weight_decay"]:12g}  '
    f'{row["validation_top1"]:16.3f}' + ('  selected' * (row == selected))
    for row in results['grid']
  ]
  encoder = 'untrained encoder' if results['random_init'] else 'frozen features'
  left_out = ''
  if results['left_out']:
    left_out = f', {results["left_out"]} left out'
  knn = ''
  if 'knn_top1' in results:
    knn = f', kNN top-1 {results["knn_top1"]:.3f}'
  lines += [
    '',
    f'{encoder} on {results["test_videos"]} test videos{left_out}: top-1 '
    f'{results["top1"]:.3f}, top-5 {results["top5"]:.3f}, mean over classes '
    f'{results["mean_class"]:.3f}{knn}',
    f'results: {workdir / "results.json"}',
    f'picture: {workdir / "confusion.png"}',
  ]
  attention = workdir / 'attention.png'
  if attention.exists():
    lines.append(f'picture: {attention}')
  return '\n'.join(lines)
