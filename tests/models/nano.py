"""The smallest encoder and clips of four by four by four tubelets."""

import jax
import numpy as np

from vjepa_jax.models import zoo

TUBELET = (2, 8, 8)
GRID = (4, 4, 4)


def make_video(shape=(2, 8, 32, 32, 3)):
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def build_encoder(**fields):
  return zoo.build_encoder('nano', tubelet=TUBELET, **fields)


def init(encoder, video=None):
  video = make_video() if video is None else video
  return jax.jit(encoder.init)(jax.random.key(0), video)
