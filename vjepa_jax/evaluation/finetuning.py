"""Training encoder and probe together, with labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.parallel.sharding import constrain_batch
from vjepa_jax.training.objectives.base import Objective, Params


@dataclasses.dataclass(frozen=True)
class Classifier(Objective):
  """An encoder with a probe on top; both are trained."""

  encoder: Encoder  # its `drop_path_rate` is for training only
  probe: AttentiveProbe
  label_smoothing: float = 0.0  # share of a label, spread over all classes
  seed: int = 0  # of drop path
  averaged = None

  def __call__(
    self, params: Params, video: jax.Array, key: jax.Array | None = None
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

  def classify_videos(self, params: Params, videos: jax.Array) -> jax.Array:
    """Classifies each clip of uint8 `[V, clips, T, H, W, 3]` by itself.

    Returns:
      Probabilities `[V, classes]`, the mean over the clips.
    """
    clips = videos.reshape(-1, *videos.shape[2:])
    shares = jax.nn.softmax(self(params, constrain_batch(clips)))
    return shares.reshape(*videos.shape[:2], -1).mean(axis=1)

  def init(self, key: jax.Array) -> Params:
    """See `Objective`."""
    encoder_key, probe_key = jax.random.split(key)
    video = np.zeros((1, *self.encoder.tubelet, 3), np.uint8)
    features = jnp.zeros((1, 1, self.encoder.width))
    return {
      'encoder': self.encoder.init(encoder_key, video)['params'],
      'probe': self.probe.init(probe_key, features)['params'],
    }

  def loss(self, params, frozen, batch, step=0):
    """Computes the cross-entropy of clips with a 'label', see `Objective`."""
    del frozen
    label = batch['video']['label']
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    logits = self(params, batch['video']['pixels'], key)
    expected = jax.nn.one_hot(label, self.probe.num_classes)
    expected = optax.smooth_labels(expected, self.label_smoothing)
    loss = optax.softmax_cross_entropy(logits, expected).mean()
    hits = (logits.argmax(axis=-1) == label).mean()
    return loss, {'loss': loss, 'train_top1': hits}
