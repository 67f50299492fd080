"""The feature decoder: its layout, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import NUM_PIXELS, TUBELET, make_world

from vjepa_jax.models.decoder import FeatureDecoder
from vjepa_jax.models.tubelets import patchify
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.schedules import make_schedule
from vjepa_jax.training.state import init_state
from vjepa_jax.training.step import make_train_step
from vjepa_jax.world import decoding
from vjepa_jax.world.masks import choose_hidden
from vjepa_jax.world.model import measure_space, normalize_visible
from vjepa_jax.world.predict import MaskedPredictor
from vjepa_jax.world.rollout import make_render

GRID = 2, 2, 2


def _video(count):
  """Smooth clips, each of colours of its own: uint8 `[B, 4, 16, 16, 3]`."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (count, 4, 4, 4, 3))
  return coarse.repeat(4, axis=2).repeat(4, axis=3).astype(np.uint8)


@pytest.fixture(scope='module')
def world():
  return make_world('clip', target_norm='position')


@pytest.mark.parametrize('pixel_norm', ['imagenet', 'clip'])
def test_decoded_tubelets_are_put_where_they_were(world, pixel_norm):
  """A decoder that returns its features renders the clip they were cut from."""
  encoder = world.encoder.clone(pixel_norm=pixel_norm)
  world = world._replace(encoder=encoder, target_encoder=encoder)
  decoder = FeatureDecoder(NUM_PIXELS, width=24, depth=1, num_heads=2)
  params = jax.jit(decoder.init, static_argnums=2)(
    jax.random.key(0), jnp.zeros((1, 8, NUM_PIXELS)), GRID
  )['params']
  params['linear']['kernel'] = jnp.eye(NUM_PIXELS)
  loaded = decoding.LoadedDecoder(decoder, params, None, GRID)
  masks = choose_hidden(GRID, 'future', 1, (0, 0, 1, 1))
  future = MaskedPredictor(world, None, GRID, masks, 0)
  video = _video(3)
  pixels = normalize_visible(encoder, video, np.arange(8))
  # As they would be normalised, had only the visible ones been seen.
  seen = normalize_visible(encoder, video, future.visible)
  x = (pixels.restore(pixels.video) - seen.mean) / seen.scale
  tubelets = patchify(x, TUBELET)
  rendered = make_render(future, loaded)(
    video, tubelets[:, future.visible], tubelets[:, future.hidden]
  )
  assert rendered.shape == video.shape and rendered.dtype == jnp.float32
  np.testing.assert_allclose(rendered, video, atol=0.05)


def test_a_decoder_learns_a_handful_of_clips(world):
  video = _video(6)
  space = measure_space(world, [video])
  decoder = FeatureDecoder(NUM_PIXELS, width=32, depth=1, num_heads=2)
  models = decoding.Decoding(world, decoder, 2.0)
  tx = make_optimizer()
  frozen = decoding.pack_frozen(world, space)
  init = jax.jit(functools.partial(init_state, models, tx))
  state = init(jax.random.key(0)).replace(frozen=frozen)
  values = {'learning_rate': 5e-3, 'weight_decay': 0.0, 'ema': 0.9}
  schedules = {
    name: make_schedule('constant', value=value, total_steps=1)
    for name, value in values.items()
  }
  step = jax.jit(make_train_step(models, tx, schedules))
  losses = []
  for _ in range(80):
    state, metrics = step(state, {'video': {'pixels': video}})
    losses.append(float(metrics['loss']))
  # It starts from grey; a clip's deviation is nearly 1.
  assert 0.4 < losses[0] <= 0.5
  assert losses[-1] < 0.02
  # The average is what is used, and the encoder is as it was.
  loss, _ = models.loss(
    {'decoder': state.target}, frozen, {'video': {'pixels': video}}
  )
  assert loss < 0.03
  jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)


def test_statistics_survive_their_file(world, tmp_path):
  assert decoding.read_space(tmp_path, 'its hash') is None
  space = measure_space(world, [_video(4)])
  decoding.save_space(tmp_path, space, 'its hash')
  again = decoding.read_space(tmp_path, 'its hash')
  assert again.norm == 'position'
  jax.tree.map(np.testing.assert_array_equal, again[1:], space[1:])
  with pytest.raises(ValueError, match='measured with another backbone'):
    decoding.read_space(tmp_path, 'that of another')
