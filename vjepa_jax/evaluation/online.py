"""The probe that watches pretraining: what the target knows so far."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from vjepa_jax.data import sources
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation import batching, classification, probing
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel import sharding
from vjepa_jax.progress import make_bar
from vjepa_jax.training.state import TrainState

# Labels may be any numbers from 0 on.
_MOST_CLASSES = 10**6


def make_online_probe(
  encoder: Encoder,
  mesh: Mesh,
  train: sources.Source,
  test: sources.Source,
  options: ClipOptions,
  *,
  batch_size: int,
  max_clips: int,
  attentive_labels: int | None,
  attentive_steps: int,
  num_threads: int = 2,
) -> Callable[[TrainState], dict[str, float]]:
  """Makes the function from a state to what probes of its target score.

  Every host decodes its part of the clips, once, and calls the function. They
  encode on all devices, and train the attentive probe there; the first host
  alone fits the others, on means over the tokens, and has their scores.

  Args:
    encoder: The encoder.
    mesh: All devices.
    train, test: Labelled videos that probes learn from, and held-out ones.
    options: How clips are cut.
    batch_size: Clips encoded at a time, over all hosts.
    max_clips: Of each source at most so many videos, as of `load_clips`.
    attentive_labels: Train an attentive probe too, on so many clips; 0 or None
      for none: it needs all tokens, and with them more memory.
    attentive_steps: Updates of the attentive probe.
    num_threads: Decoding threads of a host.
  """
  few = attentive_labels or 0
  options = dataclasses.replace(options, num_clips=1)

  def apply(params, batch):
    videos, labels = batch
    tokens = encoder.apply({'params': params}, videos[:, 0])
    tokens = tokens.astype(jnp.float32)
    return tokens if few else None, tokens.mean(axis=1), labels

  whole = sharding.replicate(mesh)
  map_batches = batching.make_map_batches(
    apply,
    mesh,
    batch_size,
    'config.probe.batch_size',
    out=(sharding.shard_batch(mesh), whole, whole),
  )
  own = batching.get_own_rows(mesh, batch_size)

  def load(source):
    order = np.random.default_rng(0).permutation(len(source))
    source = sources.Subset(source, np.sort(order[:max_clips]))
    batches = classification.load_batches(
      source, options, _MOST_CLASSES, batch_size, own, num_threads
    )
    total = -(-len(source) // batch_size)
    return list(make_bar(batches, total=total, desc='decoding', leave=False))

  clips = [load(source) for source in (train, test)]

  def encode(state, batches, limit):
    """Returns tokens of the first `limit` clips, and means of all."""
    tokens, means, labels = [], [], []
    for features, mean, label in map_batches(state.target, batches):
      if few and len(tokens) * batch_size < limit:
        tokens.append(batching.fetch(features))
      means.append(batching.fetch(mean))
      labels.append(batching.fetch(label))
    means, labels = np.concatenate(means), np.concatenate(labels)
    there = labels >= 0
    if not there.any():
      raise UserError(f'none of {len(labels)} clips of the probe can be read')
    first = labels[: len(tokens) * batch_size].copy()
    first[limit:] = -1
    probed = None
    if few:
      probed = probing.Batches(
        np.stack(tokens), first.reshape(len(tokens), batch_size)
      )
    return probed, means[there], labels[there]

  def evaluate(state: TrainState) -> dict[str, float]:
    limits = few, len(clips[1]) * batch_size
    (first, x, x_labels), (second, y, y_labels) = (
      encode(state, batches, limit)
      for batches, limit in zip(clips, limits, strict=True)
    )
    scores = {}
    if few:
      scores['probe_attentive'] = probing.score_attentive_batches(
        first,
        second,
        mesh,
        num_heads=encoder.num_heads,
        steps=attentive_steps,
      )
    if jax.process_index():
      return {}
    arguments = x, x_labels, y, y_labels
    return scores | {
      'probe_knn': probing.score_knn(*arguments),
      'probe_linear': probing.score_linear(*arguments),
    }

  return evaluate
