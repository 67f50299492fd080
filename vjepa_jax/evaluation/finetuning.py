"""Training encoder and probe together, with labels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.training.optimizer import decay_by_layer
from vjepa_jax.training.schedules import Schedule
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.step import TrainStep, update


@dataclasses.dataclass(frozen=True)
class Classifier:
  """An encoder with a probe on top; both are trained.

  Attributes:
    encoder: The encoder; its `drop_path_rate` is for training only.
    probe: The head.
  """

  encoder: Encoder
  probe: AttentiveProbe

  def __call__(
    self, params: Any, video: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    """Maps clips uint8 `[B, T, H, W, 3]` to float32 logits `[B, classes]`.

    Args:
      params: {'encoder', 'probe'}.
      video: Clips.
      key: Decides in training what drop path leaves out; None in evaluation.
    """
    rngs = None if key is None else {'drop_path': key}
    features = self.encoder.apply(
      {'params': params['encoder']}, video, rngs=rngs
    )
    return self.probe.apply(
      {'params': params['probe']}, features.astype(jnp.float32)
    )

  def init(
    self,
    key: jax.Array,
    encoder_params: Any,
    tx: optax.GradientTransformation,
  ) -> TrainState:
    """Puts a new probe on an encoder; to be jitted with shardings."""
    features = jnp.zeros((1, 1, self.encoder.width))
    params = {
      'encoder': encoder_params,
      'probe': self.probe.init(key, features)['params'],
    }
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      target=None,
      opt_state=tx.init(params),
    )


def make_finetune_step(
  classifier: Classifier,
  tx: optax.GradientTransformation,
  schedules: dict[str, Schedule],
  *,
  layer_decay: float,
  label_smoothing: float = 0.0,
  clip_norm: float | None = None,
  seed: int = 0,
) -> TrainStep:
  """Makes the step: cross-entropy, clipping, AdamW with decay by layer.

  An update that is not finite is left out, as in pretraining.

  Args:
    classifier: Encoder and probe.
    tx: `optax.scale_by_adam`.
    schedules: 'learning_rate' and 'weight_decay' as functions of the step.
    layer_decay: See `optimizer.decay_by_layer`; 1 for none.
    label_smoothing: Share of a label that is spread over all classes.
    clip_norm: Largest gradient norm of each module; None for no clipping.
    seed: Of drop path.

  Returns:
    A function from (state, batch) to (state, metrics), to be
    jitted with the state donated.
  """
  num_classes = classifier.probe.num_classes
  max_norm = jnp.inf if clip_norm is None else clip_norm

  def compute_loss(params, batch, step):
    key = jax.random.fold_in(jax.random.key(seed), step)
    logits = classifier(params, batch['video']['pixels'], key)
    labels = jax.nn.one_hot(batch['video']['label'], num_classes)
    labels = optax.smooth_labels(labels, label_smoothing)
    loss = optax.softmax_cross_entropy(logits, labels).mean()
    hits = (logits.argmax(axis=-1) == batch['video']['label']).mean()
    return loss, {'loss': loss, 'train_top1': hits}

  def train_step(state: TrainState, batch: dict[str, jax.Array]):
    (loss, metrics), grads = jax.value_and_grad(compute_loss, has_aux=True)(
      state.params, batch, state.step
    )
    scheduled = {name: f(state.step) for name, f in schedules.items()}
    factors = decay_by_layer(state.params, layer_decay)
    with jax.named_scope('optimizer'):
      params, opt_state, updated = update(
        tx, state, grads, loss, scheduled, max_norm, factors
      )
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, metrics | updated | scheduled

  return train_step
