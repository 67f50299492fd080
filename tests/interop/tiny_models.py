"""Models of a few thousand random parameters, for the tests of this folder."""

import jax
import numpy as np
import pytest

from vjepa_jax.interop.layout import Weights, WeightsError
from vjepa_jax.interop.load import make_abstract
from vjepa_jax.models import zoo

TUBELET = (2, 8, 8)


def fill(abstract, seed=0):
  """Makes random float32 parameters of these shapes."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), abstract
  )


def make_weights(
  positions='rope_tiled', *, mlp_dim=192, depth=2, num_mask_tokens=2
):
  """Makes an encoder and its predictor, for clips of 8 x 32 px."""
  encoder = zoo.build_encoder(
    'nano',
    tubelet=TUBELET,
    positions=positions,
    scale_init_by_depth=positions != 'sincos',
  ).clone(mlp_dim=mlp_dim)
  predictor = zoo.build_predictor(
    encoder,
    num_heads=2,
    width=24,
    depth=depth,
    num_mask_tokens=num_mask_tokens,
  )
  encoder_params, predictor_params = fill(
    (make_abstract(encoder), make_abstract(predictor, encoder.width))
  )
  return Weights(
    encoder=encoder,
    encoder_params=encoder_params,
    predictor=predictor,
    predictor_params=predictor_params,
    resolution=32,
    frames=8,
  )


def check_refused(read, path, message, **options):
  """Checks that reading fails with one line that names the path first."""
  with pytest.raises(WeightsError, match=message) as error:
    read(path, **options)
  assert str(error.value).startswith(f'{path}: ')
  assert '\n' not in str(error.value)
