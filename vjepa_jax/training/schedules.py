"""Schedules of learning rate, weight decay and EMA momentum.

Each returns a function from the step (0-based, int or traced) to a float32
scalar. `total_steps` is the length of the curve, which in the published recipes
is longer than the run: they stop at 1 / 1.25 of it (`ipe_scale`), so that the
last values of the curve are never reached.
"""

from collections.abc import Callable

import jax.numpy as jnp

from vjepa_jax.errors import UserError
from vjepa_jax.models.options import check_choice

Schedule = Callable[[int], jnp.ndarray]

KINDS = ('constant', 'cosine', 'linear')


def make_schedule(
  kind: str,
  *,
  value: float,
  total_steps: int,
  final: float | None = None,
  start: float | None = None,
  warmup_steps: int = 0,
  decay_steps: int | None = None,
  offset: int = 0,
) -> Schedule:
  """Makes a schedule: a linear warm-up, then a curve from `value` to `final`.

  Args:
    kind: 'constant', 'cosine' (half a period) or 'linear'.
    value: Value at the end of the warm-up.
    total_steps: Steps of warm-up and curve together; constant after.
    final: Value at the end of the curve; defaults to `value`.
    start: Value at the start of the warm-up; defaults to 0.
    warmup_steps: Length of the warm-up.
    decay_steps: Length of the curve at the end, `value` until then; None for
      all after the warm-up.
    offset: Added to the step. The published learning-rate schedule counts
      from 1, those of weight decay and momentum from 0.

  Raises:
    UserError: Unknown kind, or the warm-up is longer than the schedule.
  """
  check_choice('schedule', kind, KINDS)
  if warmup_steps + (decay_steps or 0) > total_steps:
    steps = f'{warmup_steps} warm-up steps'
    if decay_steps:
      steps += f' and {decay_steps} of decay'
    raise UserError(
      f'{steps} do not fit into a schedule of {total_steps} steps'
    )
  if decay_steps is None:
    decay_steps = total_steps - warmup_steps
  final = value if final is None or kind == 'constant' else final
  start = 0.0 if start is None else start

  def schedule(step):
    step = jnp.asarray(step, jnp.float32) + offset
    warm = start + (value - start) * step / max(warmup_steps, 1)
    progress = (step - (total_steps - decay_steps)) / max(decay_steps, 1)
    progress = jnp.clip(progress, 0.0, 1.0)
    if kind == 'cosine':
      progress = 0.5 - 0.5 * jnp.cos(jnp.pi * progress)
    curve = value + (final - value) * progress
    return jnp.where(step < warmup_steps, warm, curve)

  return schedule
