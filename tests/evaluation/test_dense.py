"""Single tokens are probed for what moves at their place."""

import numpy as np
import pytest

from vjepa_jax.data.clip import Clips
from vjepa_jax.evaluation import dense
from vjepa_jax.models import zoo
from vjepa_jax.models.tubelets import patchify

_ENCODER = zoo.build_encoder('nano', tubelet=(2, 8, 8))


@pytest.fixture(scope='module')
def halves():
  """Of clips that show nothing but their label."""
  labels = np.random.default_rng(0).integers(0, 8, 60)
  videos = np.zeros((60, 4, 32, 16, 3), np.uint8)
  videos += labels[:, None, None, None, None].astype(np.uint8)
  clips = Clips(videos, ('',) * 60, labels)
  return [dense.join_halves(clips, _ENCODER, seed) for seed in (0, 1)]


def test_labels_are_of_the_half_that_a_token_is_in(halves):
  for joined in halves:
    tokens = patchify(joined.videos, _ENCODER.tubelet)
    shown = np.broadcast_to(joined.own[..., None], tokens.shape)
    np.testing.assert_array_equal(tokens, shown)
    pairs = np.sort([joined.own, joined.other], axis=0)
    assert (pairs == pairs[:, :, :1]).all()
    # Each half has half of the tokens, and both borders are there.
    first = joined.own[:, :1]
    apart = first[:, 0] != joined.other[:, 0]
    assert ((joined.own == first).mean(axis=1)[apart] == 0.5).all()
    beside = joined.own[apart, 0] != joined.own[apart, 1]
    assert 0.2 < beside.mean() < 0.8
  assert (halves[0].other != halves[1].other).any()


def test_local_tokens_are_told_from_those_that_gather(halves):
  own, other = (
    [np.eye(8)[getattr(x, name)] for x in halves] for name in ('own', 'other')
  )
  found = dense.score_places(*halves, own)
  assert found == {'dense_own': 1.0, 'dense_other': 0.0}
  gathered = [a + b for a, b in zip(own, other, strict=True)]
  found = dense.score_places(*halves, gathered)
  assert found['dense_own'] < 0.65 and found['dense_other'] > 0.35
  pixels, positions = dense.score_baselines(*halves, _ENCODER)
  assert pixels['dense_own'] > 0.4
  assert max(positions.values()) < 0.3
