"""Fine-tuning: an encoder and a probe on top of it, trained with labels."""

import dataclasses
import json
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from ml_collections import config_dict
import optax

from vjepa_jax.data import pipeline
from vjepa_jax.evaluation import classification
from vjepa_jax.evaluation.finetuning import make_finetune_step
from vjepa_jax.interop.load import make_abstract
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.tasks import session
from vjepa_jax.tasks.backbone import open_split, read_backbone
from vjepa_jax.tasks.classifier import (
  build_classifier,
  init_state,
  make_schedules,
)
from vjepa_jax.tasks.pretrain import describe
from vjepa_jax.tasks.program import check_steps, get_steps
from vjepa_jax.tasks.smoke import shrink_finetuning
from vjepa_jax.training.checkpoint import Checkpoints, write_config
from vjepa_jax.training.state import TrainState


def finetune(
  config: config_dict.ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
  """Fine-tunes, or resumes what was interrupted in this workdir.

  Args:
    config: See `configs/finetune.py`.
    workdir: Directory of the run, shared by all hosts.
    profile_steps: First and last step to trace.

  Returns:
    What `results.json` holds; None if the platform took the machine back.

  Raises:
    ValueError: The config does not fit together; before anything is compiled.
  """
  start = time.perf_counter()
  workdir = epath.Path(workdir)
  config = config_dict.ConfigDict(config.to_dict())
  if config.smoke:
    config = shrink_finetuning(config, workdir)
  train, test = (open_split(config, name) for name in ('train', 'test'))
  backbone = read_backbone(config)
  write_config(workdir, config)

  # Devices, durations, models, shardings, step.
  mesh = mesh_lib.make_mesh(config.fsdp)
  batch_size = config.data.batch_size
  if batch_size % mesh.devices.size:
    raise ValueError(
      f'batch size {batch_size} is not divisible by {mesh.devices.size} data '
      'shards: change config.data.batch_size'
    )
  steps_per_epoch = len(train) / batch_size
  total_steps = get_steps(config, 'total', steps_per_epoch)
  check_steps(workdir, 0, total_steps, profile_steps)
  classifier = build_classifier(config, backbone, mesh)
  tx = optax.scale_by_adam(**config.optimizer)
  key = jax.random.key(config.seed)
  abstract = jax.eval_shape(
    lambda key, params: classifier.init(key, params, tx),
    key,
    make_abstract(classifier.encoder),
  )
  shardings = sharding.shard_tree(abstract, mesh)
  sharding.check_sufficiently_sharded(abstract, shardings, mesh)
  rows = sharding.shard_batch(mesh)
  train_step = jax.jit(
    make_finetune_step(
      classifier,
      tx,
      make_schedules(config, total_steps, steps_per_epoch),
      layer_decay=config.layer_decay,
      label_smoothing=config.label_smoothing,
      clip_norm=config.clip_norm,
      seed=config.seed,
    ),
    donate_argnums=0,
    in_shardings=(shardings, rows),
    out_shardings=(shardings, sharding.replicate(mesh)),
  )
  evaluate = _Evaluate(config, classifier, mesh, test)

  # State: from this run's checkpoint, or the backbone with a new probe.
  checkpoints = Checkpoints(
    workdir,
    model={
      'encoder': describe(classifier.encoder),
      'probe': describe(classifier.probe),
    },
    **config.checkpoint,
  )
  restored = checkpoints.restore(abstract, shardings)
  if restored is not None:
    state, position = restored
  else:
    state, position = init_state(classifier, backbone, tx, key, shardings), 0
  logging.info(
    '%d training and %d test videos of %d classes; %.1f M parameters; steps '
    '%d to %d of %d clips, %.1f epochs',
    len(train),
    len(test),
    classifier.probe.num_classes,
    sum(x.size for x in jax.tree.leaves(abstract.params)) / 1e6,
    int(state.step),
    total_steps,
    batch_size,
    total_steps / steps_per_epoch,
  )
  loader = pipeline.SampleLoader(
    (train,),
    pipeline.ClipOptions(**config.clip),
    (),
    config.seed,
    classifier.probe.num_classes,
  )
  state = session.run(
    config,
    workdir,
    state,
    train_step,
    session.make_batches(config, loader, position),
    mesh=mesh,
    checkpoints=checkpoints,
    position=position,
    samples_per_batch=batch_size // config.clip.num_clips,
    clips_per_step=batch_size,
    total_steps=total_steps,
    profile_steps=profile_steps,
    evaluate=evaluate,
    evaluate_every=get_steps(config.evaluation, 'every', steps_per_epoch),
  )
  if state is None:
    return None
  # A run that had ended before evaluates again.
  results = evaluate.results if evaluate.step == total_steps else None
  results = (results or evaluate.run(state)) | {
    'step': total_steps,
    'train_videos': len(train),
    'classes': classifier.probe.num_classes,
    'backbone': config.backbone or 'random init',
    'seconds': time.perf_counter() - start,
  }
  if jax.process_index() == 0:
    text = json.dumps(results, indent=2)
    (workdir / 'results.json').write_text(text + '\n')
    print(_format(results, workdir))
  return results


class _Evaluate:
  """Classifies the test videos; keeps what came out last.

  Attributes:
    results: Scores, and how many videos they are of; None at first.
    step: Step that they are of.
  """

  def __init__(self, config, classifier, mesh, source):
    self._predict = classification.make_predict(
      classification.average_clips(classifier),
      classifier.probe.num_classes,
      mesh,
      config.evaluation.batch_size,
      num_threads=config.data.num_threads,
    )
    self._source = source
    self._options = dataclasses.replace(
      pipeline.ClipOptions(**config.clip), num_clips=config.evaluation.segments
    )
    self.results, self.step = None, None

  def run(self, state: TrainState) -> dict[str, Any]:
    predictions = self._predict(state.params, self._source, self._options)
    self.step = int(state.step)
    self.results = classification.score(predictions) | {
      'test_videos': len(predictions.labels),
      'left_out': predictions.left_out,
    }
    return self.results

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Returns metrics of the state."""
    results = self.run(state)
    logging.info(
      'step %d: top-1 %.4f on %d test videos',
      self.step,
      results['top1'],
      results['test_videos'],
    )
    names = ('top1', 'top5', 'mean_class', 'cross_entropy')
    return {f'test_{name}': results[name] for name in names}


def _format(results: dict[str, Any], workdir: epath.Path) -> str:
  """Says the results in words."""
  left_out = ''
  if results['left_out']:
    left_out = f', {results["left_out"]} left out'
  return (
    f'top-1 {results["top1"]:.3f}, top-5 {results["top5"]:.3f}, mean over '
    f'classes {results["mean_class"]:.3f}, of {results["test_videos"]} test '
    f'videos{left_out}\nresults: {workdir / "results.json"}'
  )
