"""Which way does this place move? A linear probe of single tokens.

Two clips that each move as a whole, side by side or one above the other, make
one whose places move in two directions, known exactly. A token that tells of
its own place names the direction of its half; one in which the clip has been
gathered names that of the other half too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vjepa_jax.data.clip import Clips
from vjepa_jax.evaluation import baselines, probing
from vjepa_jax.models.encoder import Encoder

METHODS = ('dense_own', 'dense_other')
# Labelled clips and held-out ones: some ten thousand tokens.
_CLIPS = 400


class Halves(NamedTuple):
  """Clips of two halves, and the classes of what moves there."""

  videos: np.ndarray  # uint8 [N, frames, h, w, 3]
  own: np.ndarray  # int [N, K], of the half that a token is in; raster order
  other: np.ndarray  # int [N, K], of the other half


def join_halves(clips: Clips, encoder: Encoder, seed: int) -> Halves:
  """Joins halves of clips with those of others, drawn by the seed.

  The border is one of tubelets, so that every token is of one half.
  """
  rng = np.random.default_rng(seed)
  videos, labels = clips.videos[:_CLIPS], clips.labels[:_CLIPS]
  count, partner = len(videos), rng.permutation(len(videos))
  steps, height, width = encoder.compute_grid(videos.shape)
  first = np.zeros((count, height, width), bool)
  beside = rng.random(count) < 0.5
  first[beside, :, : width // 2] = True
  first[~beside, : height // 2] = True
  sides = encoder.get_tubelet(videos.shape)[1:]
  pixels = np.kron(first, np.ones((1, *sides), bool))[:, None, :, :, None]

  def label(first_half, second_half):
    cells = np.where(first.reshape(count, -1), first_half, second_half)
    return np.tile(cells, (1, steps))

  columns = labels[:, None], labels[partner][:, None]
  return Halves(
    np.where(pixels, videos, videos[partner]),
    label(*columns),
    label(*columns[::-1]),
  )


def score_places(
  train: Halves, test: Halves, features: Sequence[np.ndarray]
) -> dict[str, float]:
  """Scores a linear probe that sees one token at a time.

  Args:
    train, test: Clips to learn from, and held-out ones.
    features: Of both, float32 `[N, K, D]`.

  Returns:
    Of test tokens whose halves move in different directions the shares for
    which the probe names that of their own half, 'dense_own', and that of the
    other one, 'dense_other'. Chance is one over the number of classes.
  """
  first, second = (x.reshape(-1, x.shape[-1]) for x in features)
  probe = probing.fit_linear(first, train.own.reshape(-1))
  named = probe.predict(second).reshape(test.own.shape)
  apart = test.own != test.other
  return {
    name: float((named == truth)[apart].mean())
    for name, truth in zip(METHODS, (test.own, test.other), strict=True)
  }


def score_baselines(
  train: Halves, test: Halves, encoder: Encoder
) -> tuple[dict[str, float], dict[str, float]]:
  """Scores the pixels of single tubelets, and positions alone."""
  pixels, table = baselines.embed_pixels(train.videos, test.videos, encoder)
  positions = [np.broadcast_to(table, x.shape) for x in pixels]
  return tuple(score_places(train, test, x) for x in (pixels, positions))
