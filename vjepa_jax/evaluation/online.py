"""The probe that watches pretraining: what the target knows so far."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from vjepa_jax.data.clip import Clips
from vjepa_jax.evaluation import batching, probing
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.training.state import TrainState


def make_online_probe(
  encoder: Encoder,
  mesh: Mesh,
  train: Clips,
  test: Clips,
  *,
  batch_size: int,
  attentive_labels: int | None,
  attentive_steps: int,
) -> Callable[[TrainState], dict[str, float]]:
  """Makes the function from a state to what probes of its target score.

  Args:
    encoder: The encoder.
    mesh: Clips are encoded on all its devices; the first host alone probes.
    train, test: Clips that probes learn from, and held-out ones.
    batch_size: Clips encoded at a time, over all hosts.
    attentive_labels: Train an attentive probe too, on so many clips; 0 or None
      for none: it needs all tokens, and with them more memory.
    attentive_steps: Updates of the attentive probe.
  """
  few = attentive_labels
  extract = batching.make_extract(
    batching.apply_encoder(encoder, pool=not few),
    mesh,
    batch_size,
    'config.probe.batch_size',
  )

  def evaluate(state: TrainState) -> dict[str, float]:
    x, y = (extract(state.target, clips.videos) for clips in (train, test))
    if jax.process_index():
      return {}
    scores = {}
    if few:
      scores['probe_attentive'] = probing.score_attentive(
        x[:few],
        train.labels[:few],
        y,
        test.labels,
        num_heads=encoder.num_heads,
        steps=attentive_steps,
      )
      x, y = x.mean(axis=1), y.mean(axis=1)
    arguments = x, train.labels, y, test.labels
    return scores | {
      'probe_knn': probing.score_knn(*arguments),
      'probe_linear': probing.score_linear(*arguments),
    }

  return evaluate
