"""Fine-tuning: an encoder and a probe on top of it, trained with labels."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vjepa_jax.data import pipeline, sources
from vjepa_jax.evaluation import classification
from vjepa_jax.evaluation.finetuning import Classifier
from vjepa_jax.interop.load import describe
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.tasks.backbone import (
  count_classes,
  describe_backbone,
  open_split,
  place,
  read_backbone,
)
from vjepa_jax.tasks.program import (
  Program,
  get_compute,
  get_steps,
  make_program,
  make_rate,
)
from vjepa_jax.tasks.session import Session, prepare, report
from vjepa_jax.training.schedules import Schedule, make_schedule
from vjepa_jax.training.state import TrainState

_RATE_BATCH = 256  # that the learning rates of recipes are given for


def finetune(
  config: ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
  """Fine-tunes as `configs/finetune.py` says; writes `results.json`."""
  start = time.perf_counter()
  config = prepare(config, workdir)
  train, test = (open_split(config, name) for name in ('train', 'test'))
  backbone = read_backbone(config)
  options = pipeline.ClipOptions(**config.clip)
  loader = pipeline.SampleLoader(
    (train,), options, (), config.seed, config.num_classes
  )
  run = Session(config, workdir, loader, profile_steps)
  # Takes long: what is quickly found to be wrong has been.
  num_classes = config.num_classes or count_classes(train, test)
  run.loader = dataclasses.replace(loader, num_classes=num_classes)
  program = _build_program(config, backbone.encoder, num_classes, run)
  classifier = program.objective
  evaluate, results = _make_evaluate(config, classifier, run.mesh, test)
  model = {
    'encoder': describe(classifier.encoder),
    'probe': describe(classifier.probe),
    **describe_backbone(config, backbone.encoder_params),
  }
  state = run.open(program, model)
  if not run.resumed and backbone.encoder_params is not None:
    places = program.shardings.params['encoder']
    encoder = jax.tree.map(place, backbone.encoder_params, places)
    state = state.replace(params=state.params | {'encoder': encoder})
  logging.info(
    '%d training and %d test videos of %d classes; %.1f M parameters',
    len(train),
    len(test),
    num_classes,
    sum(x.size for x in jax.tree.leaves(state.params)) / 1e6,
  )
  state = run.train(
    state,
    program.train_step,
    evaluate=evaluate,
    evaluate_every=get_steps(config.evaluation, 'every', run.steps_per_epoch),
  )
  if state is None:
    return None
  if not results:  # a run that had ended before
    evaluate(state)
  results |= {
    'step': run.total_steps,
    'train_videos': len(train),
    'classes': num_classes,
    'backbone': config.backbone or 'random init',
    'seconds': time.perf_counter() - start,
  }
  scores, videos = classification.describe(results)
  report(run.workdir, results, f'{scores}, of {videos}')
  return results


def _build_program(
  config: ConfigDict, encoder: Encoder, num_classes: int, run: Session
) -> Program:
  """Puts a probe on an encoder, and trains both."""
  encoder = encoder.clone(
    remat=config.remat,
    drop_path_rate=config.drop_path_rate,
    **get_compute(config, run.mesh),
  )
  probe = AttentiveProbe(num_classes, encoder.num_heads, **config.probe)
  classifier = Classifier(encoder, probe, config.label_smoothing, config.seed)
  schedules = make_schedules(config, run.total_steps, run.steps_per_epoch)
  return make_program(config, classifier, schedules, run.mesh)


def make_schedules(
  config: ConfigDict, total_steps: int, steps_per_epoch: float
) -> dict[str, Schedule]:
  """Makes the schedules of learning rate, by the batch, and weight decay."""
  scale = config.data.batch_size / _RATE_BATCH
  return {
    'learning_rate': make_rate(
      config, total_steps, steps_per_epoch, scale=scale
    ),
    'weight_decay': make_schedule(
      'constant', value=config.weight_decay, total_steps=total_steps
    ),
  }


def _make_evaluate(
  config: ConfigDict, classifier: Classifier, mesh: Mesh, source: sources.Source
) -> tuple[Callable[[TrainState], dict[str, float]], dict[str, Any]]:
  """Makes what classifies the test videos, and where its last results go."""
  predict = classification.make_predict(
    classifier.classify_videos,
    classifier.probe.num_classes,
    mesh,
    config.evaluation.batch_size,
    num_threads=config.data.num_threads,
  )
  options = dataclasses.replace(
    pipeline.ClipOptions(**config.clip), num_clips=config.evaluation.segments
  )
  results = {}

  def evaluate(state: TrainState) -> dict[str, float]:
    predictions = predict(state.params, source, options)
    scores = classification.score(predictions)
    results.update(scores, **predictions.count())
    logging.info(
      'step %d: top-1 %.4f on %d test videos',
      int(state.step),
      results['top1'],
      results['test_videos'],
    )
    return {f'test_{name}': score for name, score in scores.items()}

  return evaluate, results
