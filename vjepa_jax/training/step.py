"""One training step as one pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vjepa_jax.parallel.sharding import constrain_batch
from vjepa_jax.training.objective import Batch, compute_loss
from vjepa_jax.training.optimizer import apply_adamw, clip_by_module
from vjepa_jax.training.schedules import Schedule
from vjepa_jax.training.state import TrainState, update_target

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
  objective: Any,
  tx: optax.GradientTransformation,
  schedules: dict[str, Schedule],
  *,
  clip_norm: float | None = None,
  clip_start_step: int = 0,
  microbatches: int = 1,
  loss: Callable[..., tuple[jax.Array, Metrics]] = compute_loss,
  averaged: str = 'encoder',
) -> TrainStep:
  """Makes the step: gradients, clipping, AdamW, then the EMA target.

  An update whose loss or gradient is not finite changes neither parameters nor
  moments; schedules and target go on, as under a loss scaler. The metric
  'skipped' counts it.

  Args:
    objective: The `Objective`, or what else `loss` takes for it.
    tx: `optax.scale_by_adam`.
    schedules: 'learning_rate', 'weight_decay' and 'ema', the momentum of the
      target, as functions of the step.
    clip_norm: Largest gradient norm of each module; None for no clipping.
    clip_start_step: First step, 0-based, that clips.
    microbatches: Parts of the batch that are differentiated one after the
      other, and averaged in float32 before the one update.
    loss: Function of (parameters, objective, target or teacher, batch, step),
      see `compute_loss`.
    averaged: Module whose moving average is the state's target.

  Returns:
    A function from (state, batch) to (state, metrics), to be jitted with the
    state donated.
  """

  def train_step(state: TrainState, batch: Batch):
    metrics, grads = _accumulate(objective, loss, state, batch, microbatches)
    now = {name: f(state.step) for name, f in schedules.items()}
    with jax.named_scope('optimizer'):
      limit = jnp.inf
      if clip_norm is not None:
        limit = jnp.where(state.step >= clip_start_step, clip_norm, jnp.inf)
      params, opt_state, updated = update(
        tx, state, grads, metrics['loss'], now, limit
      )
    with jax.named_scope('ema'):
      target = update_target(state.target, params[averaged], now['ema'])
    metrics |= updated | now
    state = state.replace(
      step=state.step + 1, params=params, target=target, opt_state=opt_state
    )
    return state, metrics

  return train_step


def update(
  tx: optax.GradientTransformation,
  state: TrainState,
  grads: dict[str, Any],
  loss: jax.Array,
  now: dict[str, jax.Array],
  limit: jax.Array | float,
  factors: Any = None,
) -> tuple[Any, Any, Metrics]:
  """Clips gradients and takes one AdamW step, if all is finite.

  Args:
    tx: `optax.scale_by_adam`.
    state: The state; only parameters and moments are looked at.
    grads: Gradients by module.
    loss: Loss.
    now: This step's 'learning_rate' and 'weight_decay'.
    limit: Largest gradient norm of each module.
    factors: See `optimizer.apply_adamw`.

  Returns:
    Parameters and moments, the old ones if not finite; the metrics of norms
    and 'skipped'.
  """
  grads, norms = clip_by_module(grads, limit)
  finite = jnp.isfinite(loss + sum(norms.values()))
  params, opt_state = apply_adamw(
    tx,
    grads,
    state.opt_state,
    state.params,
    now['learning_rate'],
    now['weight_decay'],
    factors,
  )
  metrics = {f'gradient_norm_{name}': n for name, n in norms.items()}
  return (
    _keep_if(finite, params, state.params),
    _keep_if(finite, opt_state, state.opt_state),
    metrics | {'skipped': 1.0 - finite},
  )


def _accumulate(
  objective: Any,
  loss: Callable[..., tuple[jax.Array, Metrics]],
  state: TrainState,
  batch: Batch,
  microbatches: int,
) -> tuple[Metrics, Any]:
  """Averages metrics and gradients over the microbatches of a batch."""
  target = state.target if state.teacher is None else state.teacher

  def differentiate(part):
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
      state.params, objective, target, part, state.step
    )
    return metrics, grads

  if microbatches == 1:
    return differentiate(batch)
  # Row r goes to microbatch r % microbatches: each device splits the rows it
  # has, and none is moved between devices.
  parts = jax.tree.map(
    lambda x: jnp.moveaxis(
      constrain_batch(x.reshape(-1, microbatches, *x.shape[1:])), 1, 0
    ),
    batch,
  )

  def add(total, part):
    return jax.tree.map(jnp.add, total, differentiate(part)), None

  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32),
    jax.eval_shape(differentiate, first),
  )
  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / microbatches, total)


def _keep_if(finite: jax.Array, new: Any, old: Any) -> Any:
  """Takes the new tree if `finite`, else the old."""
  return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
