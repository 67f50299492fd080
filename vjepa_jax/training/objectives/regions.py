"""Regions of a clip: what is visible, and how far it is from what is hidden."""

import math

import jax
import jax.numpy as jnp

from vjepa_jax.models.positions import Grid


def measure_distance(
  context_ids: jax.Array, target_ids: jax.Array, grid: Grid
) -> jax.Array:
  """Measures how far visible tokens are from the nearest target.

  Args:
    context_ids: int32 `[B, Kc]`, raster order over (t, h, w).
    target_ids: int32 `[B, Kt]`, raster order over (t, h, w).
    grid: Tubelet grid.

  Returns:
    Euclidean distances in tokens, float32 `[B, Kc]`, at least 1.
  """
  places = jnp.stack(
    jnp.unravel_index(jnp.arange(math.prod(grid)), grid), axis=-1
  ).astype(jnp.float32)
  apart = places[context_ids][:, :, None] - places[target_ids][:, None]
  return jnp.sqrt(jnp.square(apart).sum(axis=-1).min(axis=-1))
