"""The loss on visible tokens of V-JEPA 2.1 (arXiv 2603.14482)."""

from collections.abc import Sequence
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


def compute_context_loss(
  visible: Sequence[jax.Array],
  known: Sequence[jax.Array],
  context_ids: Sequence[jax.Array],
  target_ids: Sequence[jax.Array],
  grid: Grid,
  *,
  loss_exp: float,
  by_distance: bool,
) -> jax.Array:
  """Computes the loss on visible tokens, the mean over mask specs.

  Args:
    visible: Predictions `[B, Kc, D]`, one entry a mask spec.
    known: What they should be, float32 `[B, Kc, D]`.
    context_ids: int32 `[B, Kc]`, raster order over (t, h, w).
    target_ids: int32 `[B, Kt]`.
    grid: Tubelet grid.
    loss_exp: Power of the error.
    by_distance: Divide a token's error by the square root of its distance to
      the nearest target.

  Returns:
    A float32 scalar.
  """
  losses = []
  for i, features in enumerate(visible):
    p = loss_exp
    error = jnp.abs(features.astype(jnp.float32) - known[i]) ** p / p
    if by_distance:
      distance = measure_distance(context_ids[i], target_ids[i], grid)
      error *= jax.lax.rsqrt(distance)[..., None]
    losses.append(jnp.mean(error))
  return sum(losses) / len(losses)


def ramp_weight(
  weight: float, warmup_steps: tuple[int, int], step: jax.Array | int
) -> jax.Array | float:
  """Returns a weight that rises linearly from 0 between two steps."""
  start, end = warmup_steps
  if end <= start:
    return weight
  progress = (jnp.asarray(step, jnp.float32) - start) / (end - start)
  return weight * jnp.clip(progress, 0.0, 1.0)
