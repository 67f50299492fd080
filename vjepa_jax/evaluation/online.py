"""The probe that watches pretraining: what the target knows so far."""

from collections.abc import Callable, Iterable
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from vjepa_jax.data import sources
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.readers import Journal
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
  journals: tuple[Journal, Journal],
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
    journals: Of this host's readers of `train` and `test`.
  """
  few = attentive_labels or 0

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
  options = dataclasses.replace(options, num_clips=1)
  train_clips, test_clips = (
    _load(source, max_clips, options, batch_size, own, num_threads, journal)
    for source, journal in zip((train, test), journals, strict=True)
  )

  def evaluate(state: TrainState) -> dict[str, float]:
    first, *learned = _collect(map_batches(state.target, train_clips), few)
    most = len(test_clips) * batch_size if few else 0
    second, *held_out = _collect(map_batches(state.target, test_clips), most)
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
    return scores | {
      'probe_knn': probing.score_knn(*learned, *held_out),
      'probe_linear': probing.score_linear(*learned, *held_out),
    }

  return evaluate


def _load(
  source: sources.Source,
  max_clips: int,
  options: ClipOptions,
  batch_size: int,
  own: np.ndarray,
  num_threads: int,
  journal: Journal,
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Decodes a host's rows of all batches of clips and labels.

  At most `max_clips`, chosen at random, always the same.
  """
  order = np.random.default_rng(0).permutation(len(source))
  source = sources.Subset(source, np.sort(order[:max_clips]))
  batches = classification.load_batches(
    source, options, _MOST_CLASSES, batch_size, own, num_threads, journal
  )
  total = -(-len(source) // batch_size)
  return list(make_bar(batches, total=total, desc='decoding', leave=False))


def _collect(
  encoded: Iterable[tuple[jax.Array | None, jax.Array, jax.Array]],
  most: int,
) -> tuple[probing.Batches | None, np.ndarray, np.ndarray]:
  """Copies what was encoded to the host.

  Args:
    encoded: Tokens, their means and labels, batch by batch.
    most: Clips whose tokens are wanted, the first ones.

  Returns:
    The tokens, None if none are wanted; the means `[N, D]` and the labels `[N]`
    of all clips that can be read.

  Raises:
    UserError: None can be read.
  """
  tokens, means, labels = [], [], []
  for features, mean, label in encoded:
    if len(tokens) * len(label) < most:
      tokens.append(batching.fetch(features))
    means.append(batching.fetch(mean))
    labels.append(batching.fetch(label))
  batches = None
  if tokens:
    wanted = np.stack(labels[: len(tokens)])
    wanted.reshape(-1)[most:] = -1
    batches = probing.Batches(np.stack(tokens), wanted)
  means, labels = np.concatenate(means), np.concatenate(labels)
  there = labels >= 0
  if not there.any():
    raise UserError(f'none of {len(labels)} clips of the probe can be read')
  return batches, means[there], labels[there]
