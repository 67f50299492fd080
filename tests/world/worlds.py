"""Small world models, and clips for them."""

import jax
import numpy as np

from vjepa_jax.models import zoo
from vjepa_jax.world.baselines import make_untrained
from vjepa_jax.world.model import WorldModel

GRID, TUBELET = (4, 2, 2), (2, 8, 8)
NUM_PIXELS = 3 * 2 * 8 * 8


def make_video(count=4, seed=0, frames=8):
  """Noise that all of a model sees: uint8 `[count, frames, 16, 16, 3]`."""
  shape = (count, frames, 16, 16, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_world(pixel_norm='imagenet', levels=(), **fields):
  """Makes a model whose every part matters: none is zero, no two are equal.

  With `levels` it is one of V-JEPA 2.1.
  """
  encoder = zoo.build_encoder(
    'nano',
    tubelet=TUBELET,
    pixel_norm=pixel_norm,
    init_std=0.0,
    levels=levels,
    modalities=bool(levels),
    positions='rope_rescaled' if levels else 'sincos',
  )
  out_width = len(levels) * encoder.width or None
  predictor = zoo.build_predictor(
    encoder,
    num_heads=2,
    width=24,
    depth=1,
    out_width=NUM_PIXELS if fields.get('targets') == 'pixels' else out_width,
    num_mask_tokens=2,
    levels=max(len(levels), 1),
    predict_context=bool(levels),
  )
  world = WorldModel(encoder, predictor, encoder, {}, **fields)
  params = make_untrained(world, 0).params
  # These are next to nothing at first, and the target is the student.
  for name in ('modality_video', 'modality_image') if levels else ():
    params['predictor'][name] = jax.random.normal(jax.random.key(2), (24,))
    params['predictor'][name] *= 1 + (name == 'modality_image')
  params['predictor']['mask_tokens'] = jax.random.normal(
    jax.random.key(1), (2, 24)
  )
  params['target'] = jax.tree.map(lambda x: 1.02 * x, params['target'])
  return world._replace(params=params)
