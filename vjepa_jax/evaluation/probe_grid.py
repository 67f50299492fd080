"""A grid of probes, trained in one pass over frozen features.

The encoder runs once a batch; probes of all learning rates and weight decays
learn from its features side by side, as one vectorised probe (V-JEPA 2,
section 5, trains some twenty together).
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel.sharding import constrain_batch
from vjepa_jax.training.objectives.base import Batch
from vjepa_jax.training.schedules import Schedule
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.step import TrainStep, update


@dataclasses.dataclass(frozen=True)
class ProbeGrid:
  """Probes on a frozen encoder, one for each pair of rate and decay."""

  encoder: Encoder | None  # None if batches hold features
  probe: nn.Module  # features [B, tokens, D] -> logits [B, classes]
  points: tuple[tuple[float, float], ...]  # learning rate, weight decay of each
  # Clips of a video, and blocks of the encoder counted from 0 (None for the
  # last one alone), whose tokens a probe sees together.
  segments: int = 1
  layers: tuple[int, ...] | None = None
  # Probes that are computed side by side, the others after them: less memory
  # for activations, the same numbers. None for all.
  group_size: int | None = None

  def init(
    self,
    key: jax.Array,
    tx: optax.GradientTransformation,
    width: int | None = None,
  ) -> TrainState:
    """Makes the state at step 0: all probes start from the same parameters.

    Without an encoder, `width` is that of the features.
    """
    features = jnp.zeros((1, 1, width or self.encoder.width))
    one = self.probe.init(key, features)['params']
    count = len(self.points)
    params = {'probe': jax.tree.map(lambda x: jnp.stack([x] * count), one)}
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      target=None,
      opt_state=jax.vmap(tx.init)(params),
    )

  def map(self, f: Callable[..., Any], *trees: Any) -> Any:
    """Applies `f` to each probe's part of the trees, along their first axis."""
    if self.group_size is None:
      return jax.vmap(f)(*trees)
    return jax.lax.map(
      lambda parts: f(*parts), trees, batch_size=self.group_size
    )

  def encode(self, params: Any, videos: jax.Array) -> jax.Array:
    """Encodes videos, all segments of one together.

    Args:
      params: Of the encoder.
      videos: uint8 `[V, segments * views, T, H, W, 3]`, the views of a segment
        one after the other.

    Returns:
      `[V, views, segments * layers * N, D]`, in the encoder's compute dtype.
    """
    count, clips = videos.shape[:2]
    flat = constrain_batch(videos.reshape(-1, *videos.shape[2:]))
    features = self.encoder.apply({'params': params}, flat, layers=self.layers)
    if self.layers is not None:
      features = jnp.concatenate(features, axis=1)  # [.., layers * N, D]
    views = clips // self.segments
    features = jax.lax.stop_gradient(features).reshape(
      count, self.segments, views, *features.shape[1:]
    )
    features = jnp.moveaxis(features, 2, 1)  # [V, views, segments, N, D]
    return features.reshape(count, views, -1, features.shape[-1])

  def classify(self, params: Any, features: jax.Array) -> jax.Array:
    """Classifies `[V, views, tokens, D]` by all probes, whose axis is first.

    Returns:
      Probabilities `[V, probes, classes]`, the mean over the views.
    """
    flat = features.reshape(-1, *features.shape[2:])
    logits = self.map(lambda p: self.probe.apply({'params': p}, flat), params)
    shares = jax.nn.softmax(logits)  # [probes, V * views, classes]
    shares = shares.reshape(len(self.points), *features.shape[:2], -1)
    return jnp.swapaxes(shares.mean(axis=2), 0, 1)


def make_probe_step(
  grid: ProbeGrid,
  tx: optax.GradientTransformation,
  schedule: Schedule,
  clip_norm: float | None = None,
) -> TrainStep:
  """Makes the step: cross-entropy and AdamW, for each probe by itself.

  A probe whose loss or gradient is not finite stays as it is; the others go on.

  Args:
    grid: The probes. Parameters of the encoder are the state's `frozen`, which
      passes through as it is.
    tx: See `optimizer.make_optimizer`.
    schedule: Share of each probe's learning rate at a step.
    clip_norm: Largest gradient norm of a probe; None for no clipping.

  Returns:
    A function from (state, batch) to (state, metrics), to be jitted with the
    state donated. The stream 'video' has 'label' int32 `[V * segments]`, a
    video's one after the other, -1 where there is none, and 'pixels' uint8
    `[V * segments, T, H, W, 3]`; or 'features' `[V, tokens, D]` and 'label'
    `[V]`.
  """
  max_norm = jnp.inf if clip_norm is None else clip_norm
  rates, decays = np.float32(grid.points).T

  def compute_loss(params, features, labels):
    logits = grid.probe.apply({'params': params['probe']}, features)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = logits.argmax(axis=-1) == labels
    there = labels >= 0
    return loss.mean(where=there), hits.mean(where=there)

  def train_step(state: TrainState, batch: Batch):
    stream = batch['video']
    labels = stream['label']
    if 'features' in stream:
      features = stream['features']
    else:
      video = stream['pixels']
      videos = video.reshape(-1, grid.segments, *video.shape[1:])
      features = grid.encode(state.frozen, videos)[:, 0]
      labels = labels[:: grid.segments]
    share = schedule(state.step)

    def train_probe(params, opt_state, rate, decay):
      (loss, hits), grads = jax.value_and_grad(compute_loss, has_aux=True)(
        params, features, labels
      )
      params, opt_state, updated = update(
        tx,
        params,
        opt_state,
        grads,
        loss=loss,
        rates={'learning_rate': rate, 'weight_decay': decay},
        max_norm=max_norm,
      )
      return params, opt_state, loss, hits, updated['skipped']

    params, opt_state, loss, hits, skipped = grid.map(
      train_probe, state.params, state.opt_state, rates * share, decays
    )
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, {
      'loss': jnp.nanmin(loss),
      'train_top1': hits.max(),
      'learning_rate': rates.max() * share,
      'lost_probes': skipped.sum(),
      'skipped': skipped.min(),
    }

  return train_step
