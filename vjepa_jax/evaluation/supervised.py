"""Training with labels: the proof that a task can be learned at a size."""

from typing import Any

import jax
import numpy as np
import optax

from vjepa_jax.evaluation.probing import LabelledClips
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.progress import make_bar


def score_supervised(
  encoder: Encoder,
  train: LabelledClips,
  test: LabelledClips,
  *,
  steps: int,
  batch_size: int = 64,
  learning_rate: float = 1e-3,
  weight_decay: float = 0.04,
  seed: int = 0,
) -> list[tuple[int, float]]:
  """Trains encoder and attentive probe together on labels.

  AdamW with 50 steps of warm-up and a cosine to 0, and no augmentation: what a
  pretrained encoder of this size could know about the labels at best.

  Args:
    encoder: The encoder, trained from its initialisation.
    train: Training clips.
    test: Held-out clips.
    steps: Updates.
    batch_size: Clips a step.
    learning_rate: At the end of the warm-up.
    weight_decay: Of all but biases and norms.
    seed: Of initialisation and order.

  Returns:
    Steps and shares of held-out clips classified right, ten times.
  """
  probe = AttentiveProbe(int(train.labels.max()) + 1, encoder.num_heads)
  encoder_key, probe_key = jax.random.split(jax.random.key(seed))

  def classify(params: Any, videos: jax.Array) -> jax.Array:
    features = encoder.apply({'params': params['encoder']}, videos)
    return probe.apply({'params': params['probe']}, features)

  @jax.jit
  def init(videos):
    params = {'encoder': encoder.init(encoder_key, videos)['params']}
    features = encoder.apply({'params': params['encoder']}, videos)
    return params | {'probe': probe.init(probe_key, features)['params']}

  warmup = min(50, steps // 4)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      optax.warmup_cosine_decay_schedule(0, learning_rate, warmup, steps),
      weight_decay=weight_decay,
      mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
    ),
  )

  @jax.jit
  def step(params, opt_state, videos, labels):
    def loss(params):
      return optax.softmax_cross_entropy_with_integer_labels(
        classify(params, videos), labels
      ).mean()

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  predict = jax.jit(lambda p, x: classify(p, x).argmax(axis=-1))

  def score(params):
    predicted = [
      np.asarray(predict(params, test.videos[start : start + batch_size]))
      for start in range(0, len(test.videos), batch_size)
    ]
    return float(np.mean(np.concatenate(predicted) == test.labels))

  params = init(train.videos[:1])
  opt_state = tx.init(params)
  rng = np.random.default_rng(seed)
  scores = []
  bar = make_bar(range(1, steps + 1), desc='with labels', unit='step')
  for number in bar:
    rows = rng.choice(len(train.labels), min(batch_size, len(train.labels)))
    params, opt_state = step(
      params, opt_state, train.videos[rows], train.labels[rows]
    )
    if number % max(steps // 10, 1) == 0 or number == steps:
      scores.append((number, score(params)))
      bar.set_postfix_str(f'held-out {scores[-1][1]:.3f}')
  return scores
