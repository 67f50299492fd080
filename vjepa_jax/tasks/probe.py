"""Frozen evaluation: a grid of probes on features that stay as they are."""

import contextlib
import dataclasses
import json
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict
import numpy as np
import optax

from vjepa_jax.data import decode, pipeline, sources
from vjepa_jax.data.features import (
  FeatureLoader,
  FeatureSource,
  holds_features,
)
from vjepa_jax.evaluation import classification, probing
from vjepa_jax.evaluation.probe_grid import (
  ProbeGrid,
  make_points,
  make_probe_step,
)
from vjepa_jax.interop.load import make_abstract
from vjepa_jax.models.attention import choose_attention
from vjepa_jax.models.encoder import check_layers
from vjepa_jax.models.probe import (
  AttentiveProbe,
  LinearProbe,
  compute_attention,
)
from vjepa_jax.models.tubelets import compute_grid
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.plots import training as pictures
from vjepa_jax.tasks import session
from vjepa_jax.tasks.backbone import (
  count_classes,
  open_split,
  place,
  read_backbone,
)
from vjepa_jax.tasks.program import check_steps, get_steps
from vjepa_jax.training.checkpoint import Checkpoints, write_config
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
  workdir = epath.Path(workdir)
  config = config_dict.ConfigDict(config.to_dict())
  train, validation, test = _open_splits(config)
  backbone = read_backbone(config)
  cached = holds_features(config.data.train)
  if cached:
    config.segments = 1  # all of a video's are in one record
  write_config(workdir, config)

  # Devices, durations, models, shardings, step.
  mesh = mesh_lib.make_mesh(config.fsdp)
  clips = config.data.batch_size * config.segments
  if clips % mesh.devices.size:
    raise ValueError(
      f'{config.data.batch_size} videos of {config.segments} clips do not '
      f'split over {mesh.devices.size} devices: change config.data.batch_size'
    )
  steps_per_epoch = len(train) / config.data.batch_size
  total_steps = get_steps(config, 'total', steps_per_epoch)
  check_steps(workdir, 0, total_steps, profile_steps)
  grid = _build_grid(config, backbone.encoder, mesh)
  tx = optax.scale_by_adam(**config.optimizer)
  key = jax.random.key(config.seed)
  abstract = jax.eval_shape(lambda key: grid.init(key, tx), key).replace(
    teacher=make_abstract(grid.encoder)
  )
  shardings = sharding.shard_tree(abstract, mesh)
  rows = sharding.shard_batch(mesh)
  train_step = jax.jit(
    make_probe_step(
      grid,
      tx,
      make_schedule('cosine', value=1.0, final=0.0, total_steps=total_steps),
      config.probe.clip_norm,
    ),
    donate_argnums=0,
    in_shardings=(shardings, rows),
    out_shardings=(shardings, sharding.replicate(mesh)),
  )
  evaluation = _Evaluation(config, grid, mesh, validation, cached)

  # State: new probes, or those of this run's checkpoint, on the backbone.
  checkpoints = Checkpoints(workdir, **config.checkpoint)
  restored = checkpoints.restore(abstract, shardings)
  if restored is not None:
    state, position = restored
  else:
    init = jax.jit(
      lambda key: grid.init(key, tx),
      out_shardings=shardings.replace(teacher=None),
    )
    state, position = init(key), 0
  state = state.replace(
    teacher=_load_encoder(config, backbone, grid, shardings.teacher)
  )
  logging.info(
    '%d probes of %d classes; %d training, %d validation and %d test videos; '
    'steps %d to %d, %.1f epochs',
    len(grid.points),
    grid.probe.num_classes,
    len(train),
    len(validation),
    len(test),
    int(state.step),
    total_steps,
    total_steps / steps_per_epoch,
  )
  state = session.run(
    config,
    workdir,
    state,
    train_step,
    session.make_batches(
      config,
      _make_loader(config, train, grid.probe.num_classes),
      position,
      batch_size=clips,
    ),
    mesh=mesh,
    checkpoints=checkpoints,
    position=position,
    samples_per_batch=config.data.batch_size,
    clips_per_step=clips,
    total_steps=total_steps,
    profile_steps=profile_steps,
    evaluate=evaluation,
    evaluate_every=max(
      1, round(config.validate_every_epochs * steps_per_epoch)
    ),
  )
  if state is None:
    return None
  results, tested = evaluation.test(state, test)
  if config.knn:
    results['knn_top1'] = evaluation.score_knn(state, train, test, config.knn)
  results |= {
    'train_videos': len(train),
    'classes': grid.probe.num_classes,
    'backbone': config.backbone,
    'random_init': config.random_init,
    'seconds': time.perf_counter() - start,
  }
  if jax.process_index() == 0:
    (workdir / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    pictures.draw_confusion(
      workdir / 'confusion.png',
      tested.labels,
      tested.probabilities.argmax(axis=-1),
      grid.probe.num_classes,
    )
  if config.probe.kind == 'attentive' and not cached:
    best = results['grid'].index(results['selected'])
    evaluation.draw_attention(state, best, test, workdir / 'attention.png')
  if jax.process_index() == 0:
    print(_format(results, workdir))
  return results


class _Evaluation:
  """Validates all probes of the grid, and tests the one that was selected."""

  def __init__(self, config, grid: ProbeGrid, mesh, validation, cached: bool):
    self._grid, self._points = grid, grid.points
    self._validation = validation
    self._options = None
    if not cached:
      self._options = dataclasses.replace(
        pipeline.ClipOptions(**config.clip),
        num_clips=config.segments,
        views=config.views,
      )

    def encode(params, inputs):
      return inputs if cached else grid.encode(params['encoder'], inputs)

    def pool(params, inputs):
      return encode(params, inputs).astype(jnp.float32).mean(axis=(1, 2))

    def classify(params, inputs):
      return grid.classify(params['probe'], encode(params, inputs))

    def make_predict(apply):
      return classification.make_predict(
        apply,
        grid.probe.num_classes,
        mesh,
        config.evaluation.batch_size,
        num_threads=config.data.num_threads,
      )

    self._make_predict = make_predict
    self._predict, self._pool = make_predict(classify), make_predict(pool)

  def _run(self, state: TrainState, source) -> classification.Predictions:
    params = {'encoder': state.teacher, 'probe': state.params['probe']}
    return self._predict(params, source, self._options)

  def _validate(self, state: TrainState) -> list[float]:
    """Returns the top-1 of each probe on the validation videos."""
    probabilities, labels, left_out = self._run(state, self._validation)
    if not len(labels):
      raise ValueError(f'none of {left_out} validation videos could be read')
    hits = probabilities.argmax(axis=-1) == labels[:, None]
    return hits.mean(axis=0).tolist()

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Returns metrics of the state."""
    scores = self._validate(state)
    best = int(np.argmax(scores))
    logging.info(
      'step %d: top-1 on validation %.4f, by learning rate %g and weight decay '
      '%g',
      int(state.step),
      scores[best],
      *self._points[best],
    )
    return {'validation_top1': scores[best]}

  def test(
    self, state: TrainState, source: sources.Source
  ) -> tuple[dict[str, Any], classification.Predictions]:
    """Selects a probe on the validation videos and tests it on others.

    Returns:
      Results, and the predictions of the selected probe.
    """
    scores = self._validate(state)
    best = int(np.argmax(scores))
    predictions = self._run(state, source)
    predictions = predictions._replace(
      probabilities=predictions.probabilities[:, best]
    )
    rows = [
      {'learning_rate': rate, 'weight_decay': decay, 'validation_top1': score}
      for (rate, decay), score in zip(self._points, scores, strict=True)
    ]
    return classification.score(predictions) | {
      'test_videos': len(predictions.labels),
      'left_out': predictions.left_out,
      'selected': rows[best],
      'selected_by': 'top-1 on validation videos, which are not the test ones',
      'validation_videos': len(self._validation),
      'grid': rows,
    }, predictions

  def draw_attention(
    self,
    state: TrainState,
    best: int,
    source: sources.Source,
    path: epath.Path,
  ) -> None:
    """Draws where probe `best` of the grid looks in the first videos."""
    grid = self._grid

    def attend(params, videos):
      features = grid.encode(params['encoder'], videos)[:, 0]
      one = jax.tree.map(lambda x: x[best], params['probe'])
      return compute_attention(grid.probe, one, features)

    few = sources.Subset(source, np.arange(min(_LOOKED_AT, len(source))))
    options = dataclasses.replace(self._options, views=1)
    params = {'encoder': state.teacher, 'probe': state.params['probe']}
    attention, labels, _ = self._make_predict(attend)(params, few, options)
    if jax.process_index():
      return
    clips = []
    for record in few:
      # What is damaged was left out there too, and told.
      with contextlib.suppress(decode.DecodeError):
        clips.append(pipeline.read_clips(record, options))
    if not clips:
      return
    videos = np.stack(clips)  # [n, segments, T, H, W, 3]
    videos = videos.reshape(len(videos), -1, *videos.shape[3:])
    sides = compute_grid(clips[0].shape, grid.encoder.tubelet)
    layers = len(grid.layers or (None,))
    attention = attention.reshape(len(videos), grid.segments, layers, *sides)
    pictures.draw_attention(
      path,
      videos,
      attention.sum(axis=2).reshape(len(videos), -1, *sides[1:]),
      [f'class {label}' for label in labels],
    )

  def score_knn(self, state: TrainState, train, test, neighbours: int) -> float:
    """Scores nearest neighbours on means over all tokens of a video."""
    params = {'encoder': state.teacher}
    (x, labels, _), (y, test_labels, _) = (
      self._pool(params, source, self._options) for source in (train, test)
    )
    return probing.score_knn(x, labels, y, test_labels, neighbours)


def _open_splits(config: config_dict.ConfigDict) -> list[sources.Source]:
  """Opens training, validation and test videos, or their features."""
  names = [n for n in ('train', 'validation', 'test') if config.data[n]]
  cached = [n for n in names if holds_features(config.data[n])]
  if cached and cached != names:
    raise ValueError(
      f'config.data.{cached[0]} holds features and others hold videos: give '
      'features of all, by python -m vjepa_jax.tools.extract, or of none'
    )
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


def _make_loader(config, train, num_classes: int):
  """Makes the loader of training clips, or of features."""
  if holds_features(config.data.train):
    return FeatureLoader((train,), config.seed, num_classes)
  options = pipeline.ClipOptions(**config.clip)
  options = dataclasses.replace(options, num_clips=config.segments)
  return pipeline.SampleLoader((train,), options, (), config.seed, num_classes)


def _build_grid(config, encoder, mesh: Mesh) -> ProbeGrid:
  dtype = jnp.dtype(config.compute_dtype)
  attention = config.attention
  if attention == 'auto':
    attention = choose_attention(mesh_lib.get_platform(mesh), dtype)
  encoder = encoder.clone(dtype=dtype, attention=attention, remat='none')
  num_classes = config.num_classes or count_classes(config, ('train', 'test'))
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
      num_classes,
      heads,
      options.depth,
      options.output_projection,
      attention=attention,
      dtype=dtype,
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
  return ProbeGrid(
    encoder, module, points, config.segments, layers, options.at_once
  )


def _load_encoder(config, backbone, grid: ProbeGrid, places) -> Any:
  """Places the encoder's parameters: those of the backbone, or untrained."""
  if backbone.encoder_params is None or config.random_init:
    # The very weights that pretraining with this seed starts from.
    key = jax.random.split(jax.random.key(config.seed))[0]
    video = np.zeros((1, *grid.encoder.tubelet, 3), np.uint8)
    return jax.jit(
      lambda key: grid.encoder.init(key, video)['params'], out_shardings=places
    )(key)
  return jax.tree.map(place, backbone.encoder_params, places)


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
