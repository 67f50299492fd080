"""What a recipe with labels builds: backbone, classifier, state, schedules."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict
import numpy as np
import optax

from vjepa_jax.data import pipeline, sources
from vjepa_jax.interop.layout import Weights
from vjepa_jax.interop.load import read_clip_rate, read_weights
from vjepa_jax.models import zoo
from vjepa_jax.models.attention import choose_attention
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.models.tubelets import compute_grid
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.progress import make_bar
from vjepa_jax.tasks.program import get_steps
from vjepa_jax.training.finetuning import Classifier
from vjepa_jax.training.schedules import Schedule, make_schedule
from vjepa_jax.training.state import TrainState

_RATE_BATCH = 256  # that the learning rates of recipes are given for


def open_split(config: config_dict.ConfigDict, name: str) -> sources.Source:
  """Opens the videos of one split."""
  if not config.data[name]:
    raise ValueError(
      f'config.data.{name} is empty: give a manifest of `path label` lines, '
      'ArrayRecord shards with labels or tfds:name/split'
    )
  return sources.open_source(config.data[name])


def read_backbone(config: config_dict.ConfigDict) -> Weights:
  """Reads the backbone, and fills in what the config leaves to it.

  Raises:
    ValueError: The backbone cannot be used, or does not say what is asked.
  """
  if config.backbone:
    backbone = read_weights(
      config.backbone, which=config.which, with_predictor=False
    )
    if backbone.encoder is None:
      raise ValueError(f'{config.backbone} holds probes, and no encoder')
  else:
    backbone = Weights(zoo.build_encoder(**config.encoder))
  for name in ('frames', 'resolution'):
    if config.clip[name] is None:
      config.clip[name] = getattr(backbone, name)
    if config.clip[name] is None:
      raise ValueError(f'the backbone does not say: set config.clip.{name}')
  if config.clip.frame_step is None and config.clip.fps is None:
    config.clip.update(read_clip_rate(config.backbone))
  sides = [config.clip.frames, *[config.clip.resolution] * 2]
  compute_grid((1, *sides), backbone.encoder.tubelet)  # raises if it is none
  return backbone


def build_classifier(
  config: config_dict.ConfigDict, backbone: Weights, mesh: Mesh
) -> Classifier:
  """Puts a probe on the encoder of the backbone, for the mesh's platform."""
  dtype = jnp.dtype(config.compute_dtype)
  attention = config.attention
  if attention == 'auto':
    attention = choose_attention(mesh_lib.get_platform(mesh), dtype)
  encoder = backbone.encoder.clone(
    dtype=dtype,
    attention=attention,
    remat=config.remat,
    drop_path_rate=config.drop_path_rate,
  )
  probe = AttentiveProbe(
    config.num_classes or _count_classes(config),
    encoder.num_heads,
    **config.probe,
  )
  return Classifier(encoder, probe)


def _count_classes(config: config_dict.ConfigDict) -> int:
  """Reads all labels: one more than the largest.

  Raises:
    ValueError: A video has no label, or all have the same.
  """
  largest = 0
  for name in ('train', 'test'):
    source = open_split(config, name)
    bar = make_bar(range(len(source)), desc=f'{name} labels', leave=False)
    for record in (source[i] for i in bar):
      pipeline.check_label(record, 10**6)
      largest = max(largest, record.label)
  if not largest:
    raise ValueError('all labels are 0: there is nothing to tell apart')
  return largest + 1


def init_state(
  classifier: Classifier,
  backbone: Weights,
  tx: optax.GradientTransformation,
  key: jax.Array,
  shardings: TrainState,
) -> TrainState:
  """Makes the state at step 0, each leaf where it belongs."""
  places = shardings.params['encoder']
  encoder_key, probe_key = jax.random.split(key)
  if backbone.encoder_params is None:
    video = np.zeros((1, *classifier.encoder.tubelet, 3), np.uint8)
    params = jax.jit(
      lambda key: classifier.encoder.init(key, video)['params'],
      out_shardings=places,
    )(encoder_key)
  else:
    params = jax.tree.map(_place, backbone.encoder_params, places)
  return jax.jit(
    lambda key, params: classifier.init(key, params, tx),
    out_shardings=shardings,
  )(probe_key, params)


def _place(leaf: Any, place: jax.sharding.NamedSharding) -> jax.Array:
  """Spreads an array that every host has whole over all devices."""
  leaf = np.asarray(leaf, np.float32)
  return jax.make_array_from_callback(
    leaf.shape, place, lambda index: leaf[index]
  )


def make_schedules(
  config: config_dict.ConfigDict, total_steps: int, steps_per_epoch: float
) -> dict[str, Schedule]:
  """Makes the schedules of learning rate, by the batch, and weight decay."""
  rate = config.learning_rate
  scale = config.data.batch_size / _RATE_BATCH
  return {
    'learning_rate': make_schedule(
      rate.kind,
      start=rate.start * scale,
      value=rate.value * scale,
      final=rate.final * scale,
      warmup_steps=get_steps(rate, 'warmup', steps_per_epoch),
      total_steps=total_steps,
    ),
    'weight_decay': make_schedule(
      'constant', value=config.weight_decay, total_steps=total_steps
    ),
  }
