"""One training step as one pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vjepa_jax.errors import UserError
from vjepa_jax.parallel.sharding import take_part
from vjepa_jax.training.objectives.base import Batch, Metrics, Objective, Params
from vjepa_jax.training.optimizer import clip_by_module
from vjepa_jax.training.schedules import Schedule
from vjepa_jax.training.state import TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
  objective: Objective,
  tx: optax.GradientTransformationExtraArgs,
  schedules: dict[str, Schedule],
  *,
  clip_norm: float | None = None,
  clip_start_step: int = 0,
  microbatches: int = 1,
) -> TrainStep:
  """Makes the step: gradients, clipping, the optimizer, then the EMA target.

  An update whose loss or gradient is not finite changes neither parameters nor
  moments; schedules and target go on, as under a loss scaler. The metric
  'skipped' counts it.

  Args:
    objective: The objective.
    tx: See `optimizer.make_optimizer`.
    schedules: 'learning_rate', 'weight_decay' and, where the state has a
      target, 'ema', its momentum, as functions of the step.
    clip_norm: Largest gradient norm of each module; None for no clipping.
    clip_start_step: First step, 0-based, that clips.
    microbatches: Parts of the batch that are differentiated one after the
      other, and averaged in float32 before the one update.

  Returns:
    A function from (state, batch) to (state, metrics), to be jitted with the
    state donated.

  Raises:
    UserError: The objective needs the whole batch.
  """
  if microbatches > 1 and objective.whole_batch:
    raise UserError(
      f'{microbatches} microbatches would change the loss, because '
      f'{objective.whole_batch}: set config.microbatches=1'
    )

  def train_step(state: TrainState, batch: Batch):
    metrics, grads = _accumulate(objective, state, batch, microbatches)
    rates = {name: f(state.step) for name, f in schedules.items()}
    with jax.named_scope('optimizer'):
      max_norm = jnp.inf
      if clip_norm is not None:
        max_norm = jnp.where(state.step >= clip_start_step, clip_norm, jnp.inf)
      params, opt_state, updated = update(
        tx,
        state.params,
        state.opt_state,
        grads,
        loss=metrics['loss'],
        rates=rates,
        max_norm=max_norm,
      )
    target = state.target
    if target is not None:
      momentum = rates['ema']
      with jax.named_scope('ema'):
        target = jax.tree.map(
          lambda t, p: momentum * t + (1.0 - momentum) * p,
          target,
          params[objective.averaged],
        )
    state = state.replace(
      step=state.step + 1, params=params, target=target, opt_state=opt_state
    )
    return state, metrics | updated | rates

  return train_step


def update(
  tx: optax.GradientTransformationExtraArgs,
  params: Any,
  opt_state: Any,
  grads: dict[str, Any],
  *,
  loss: jax.Array,
  rates: dict[str, jax.Array],
  max_norm: jax.Array | float,
) -> tuple[Any, Any, Metrics]:
  """Clips gradients and updates parameters, if all is finite.

  Args:
    tx: See `optimizer.make_optimizer`; `opt_state` is its state.
    params, grads: Parameters and their gradients, by module.
    loss: What has to be finite beside the gradients.
    rates: This step's 'learning_rate' and 'weight_decay'.
    max_norm: Largest gradient norm of each module.

  Returns:
    Parameters and state of the optimizer, the old ones if not finite; the
    metrics of norms and 'skipped'.
  """
  grads, norms = clip_by_module(grads, max_norm)
  finite = jnp.isfinite(loss + sum(norms.values()))
  rates = {name: rates[name] for name in ('learning_rate', 'weight_decay')}
  updates, new_state = tx.update(grads, opt_state, params, **rates)
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (optax.apply_updates(params, updates), new_state),
    (params, opt_state),
  )
  metrics = {f'gradient_norm_{name}': n for name, n in norms.items()}
  return params, opt_state, metrics | {'skipped': 1.0 - finite}


def differentiate(
  objective: Objective, state: TrainState, batch: Batch
) -> tuple[Metrics, Params]:
  """Computes metrics and gradients of a batch."""
  frozen = state.target if state.frozen is None else state.frozen
  (_, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(
    state.params, frozen, batch, state.step
  )
  return metrics, grads


def _accumulate(
  objective: Objective, state: TrainState, batch: Batch, microbatches: int
) -> tuple[Metrics, Params]:
  """Averages metrics and gradients over the microbatches of a batch."""
  if microbatches == 1:
    return differentiate(objective, state, batch)

  def run(index):
    part = take_part(batch, index, microbatches)
    return differentiate(objective, state, part)

  def add(total, index):
    return jax.tree.map(jnp.add, total, run(index)), None

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(run, 0)
  )
  total, _ = jax.lax.scan(add, zeros, jnp.arange(microbatches))
  return jax.tree.map(lambda x: x / microbatches, total)
