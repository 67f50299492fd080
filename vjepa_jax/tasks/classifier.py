"""What fine-tuning builds: classifier, state, schedules."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict
import numpy as np
import optax

from vjepa_jax.evaluation.finetuning import Classifier
from vjepa_jax.interop.layout import Weights
from vjepa_jax.models.attention import choose_attention
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.tasks.backbone import count_classes, place
from vjepa_jax.tasks.program import get_steps
from vjepa_jax.training.schedules import Schedule, make_schedule
from vjepa_jax.training.state import TrainState

_RATE_BATCH = 256  # that the learning rates of recipes are given for


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
    config.num_classes or count_classes(config, ('train', 'test')),
    encoder.num_heads,
    **config.probe,
  )
  return Classifier(encoder, probe)


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
    params = jax.tree.map(place, backbone.encoder_params, places)
  return jax.jit(
    lambda key, params: classifier.init(key, params, tx),
    out_shardings=shardings,
  )(probe_key, params)


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
