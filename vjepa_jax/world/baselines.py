"""What needs no model of the world to predict: copies, means, and no training.

Baselines see what a prediction sees, the visible pixels, and nothing else.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.positions import Grid
from vjepa_jax.training.objectives.base import init_models
from vjepa_jax.world.masks import Masks
from vjepa_jax.world.model import WorldModel


def init_predictor(world: WorldModel, key: jax.Array) -> Any:
  """Initialises the parameters of an untrained predictor."""
  ids = jnp.zeros((1, 1), jnp.int32)
  width = world.encoder.width * world.predictor.levels
  features = jnp.zeros((1, 1, width))
  init = jax.jit(world.predictor.init, static_argnums=4)
  return init(key, features, ids, ids, (1, 1, 2))['params']


def make_untrained(world: WorldModel, seed: int) -> WorldModel:
  """Returns the same model with the parameters of step 0."""
  params = jax.jit(init_models, static_argnums=(1, 2))(
    jax.random.key(seed), world.encoder, world.predictor
  )
  # A frozen teacher was trained elsewhere.
  frozen = world.targets == 'frozen'
  params['target'] = world.params['target'] if frozen else params['encoder']
  return world._replace(params=params)


def find_nearest(masks: Masks, grid: Grid) -> np.ndarray:
  """Finds the visible token next to each hidden one, in the tubelet grid.

  Returns:
    int `[H]`, indices into the visible ones. Where the future is hidden that is
    the same place at the last visible time step.
  """
  b, a = (np.stack(np.unravel_index(ids, grid), -1) for ids in masks)
  distances = np.square(a[:, None] - b[None]).sum(axis=-1)
  return distances.argmin(axis=1)


def average_places(
  features: np.ndarray, masks: Masks, grid: Grid
) -> np.ndarray:
  """Averages visible features `[B, K, D]` over time, for each hidden token.

  Returns:
    `[B, H, D]`: the mean over visible tokens of the same place, or over all
    where none is visible.
  """
  visible, hidden = (ids % (grid[1] * grid[2]) for ids in masks)
  same = (hidden[:, None] == visible[None]).astype(np.float32)
  same[same.sum(axis=1) == 0] = 1.0
  weights = same / same.sum(axis=1, keepdims=True)  # [H, K]
  return np.einsum('hk,bkd->bhd', weights, features)


def fill_pixels(
  video: np.ndarray, masks: Masks, tubelet: tuple[int, int, int], how: str
) -> np.ndarray:
  """Fills hidden tubelets from visible pixels.

  Args:
    video: uint8 `[B, frames, h, w, 3]`.
    masks: Ids of visible and of hidden tokens.
    tubelet: Tubelet size.
    how: 'last' repeats the visible frame nearest in time at the same place, or
      copies the nearest visible tubelet where that place is never visible.
      'mean' takes the mean over visible frames, or over all visible pixels.

  Returns:
    float32 `[B, frames, h, w, 3]`.
  """
  grid = tub.compute_grid(video.shape, tubelet)
  frame, (visible, hidden) = grid[1] * grid[2], masks
  x = tub.patchify(video.astype(np.float32), tubelet)
  x = x.reshape(*x.shape[:2], tubelet[0], -1).copy()  # [B, N, t, p * p * 3]
  if how == 'mean':
    flat = x[:, visible].mean(axis=2)  # [B, K, p * p * 3]
    x[:, hidden] = average_places(flat, masks, grid)[:, :, None]
  else:
    nearest = visible[find_nearest(masks, grid)]
    for token, near in zip(hidden, nearest, strict=True):
      if token % frame != near % frame:
        x[:, token] = x[:, near]
      else:
        x[:, token] = x[:, near, [-1 if near < token else 0]]
  return tub.unpatchify(x.reshape(*x.shape[:2], -1), grid, tubelet)
