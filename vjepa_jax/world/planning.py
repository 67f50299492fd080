"""Searching for actions: CEM and MPPI over what a model imagines.

A plan is as good as the energy of what is imagined of it: the distance of its
features to those of the goal (V-JEPA 2-AC, arXiv 2506.09985, section 3.2).
Nothing here knows who imagines, a model or the world itself.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vjepa_jax.errors import UserError
from vjepa_jax.training.objectives.targets import measure_error

# From plans `[S, H, A]` to the features of the H frames that follow,
# `[S, H, N, D]`.
Imagine = Callable[[jax.Array], jax.Array]
# From features `[..., H, N, D]` to energies `[...]`.
Energy = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Search:
  """How plans are searched for; of the paper by default, in its axes."""

  horizon: int = 1  # steps of a plan
  method: str = 'cem'  # or 'mppi'
  samples: int = 800  # plans an iteration
  iterations: int = 10
  elites: int = 10  # of CEM: the plans that the next ones are drawn around
  temperature: float = 0.01  # of MPPI, in units of energy
  # Of each axis of an action: how far it may go, a box and not a ball, and the
  # deviation at first.
  bound: tuple[float, ...] = (0.075, 0.075, 0.075, 0.75)
  deviation: tuple[float, ...] = (0.075, 0.075, 0.075, 1.0)
  # Of each axis: how much of mean and deviation stays an iteration.
  mean_momentum: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
  deviation_momentum: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
  least_deviation: float = 0.0
  loss_exp: float = 1  # of the energy: absolute differences, or 2 for squares
  energy: str = 'last'  # of the last imagined frame, or the 'sum' over all
  window: int | None = None  # frames that a prediction is made of; None for all
  gripper: int | None = None  # which axis it is, if any
  close_gripper: int | None = None  # it closes at this step and stays closed

  def __post_init__(self):
    """Raises UserError if a number is none, or axes differ."""
    ranges = self.bound, self.deviation
    momenta = self.mean_momentum, self.deviation_momentum
    if len({*map(len, ranges + momenta)}) > 1:
      raise UserError(
        'bound, deviation and momenta of a search have a number for each axis'
      )
    if self.gripper is None and self.close_gripper is not None:
      raise UserError('close_gripper needs gripper, the axis that it is')
    if self.method not in ('cem', 'mppi'):
      raise UserError(f"method {self.method!r} is neither 'cem' nor 'mppi'")
    if self.energy not in ('last', 'sum'):
      raise UserError(f"energy {self.energy!r} is neither 'last' nor 'sum'")
    if self.loss_exp not in (1, 2):
      raise UserError(f'loss_exp {self.loss_exp:g} is neither 1 nor 2')
    if not 0 < self.elites <= self.samples:
      raise UserError(
        f'elites={self.elites} must be some of samples={self.samples}'
      )
    if min(self.horizon, self.iterations) < 1:
      raise UserError('horizon and iterations must be positive')


class Plan(NamedTuple):
  """What a search found."""

  actions: jax.Array  # [H, A], the mean of the last elites
  energy: jax.Array  # [iterations], the least of each
  mean: jax.Array  # [H, A], as `actions` without the rules of grippers


def make_energy(options: Search, goal: jax.Array) -> Energy:
  """Makes the energy of imagined frames: how far they are from a goal `[N, D]`.

  There is no cost of actions and none of states, as published.
  """

  def energy(features):
    last = options.energy == 'last'
    counted = features[..., -1:, :, :] if last else features
    error = measure_error(counted, goal, options.loss_exp).mean(axis=(-1, -2))
    return error.sum(axis=-1)

  return energy


def search(
  options: Search,
  key: jax.Array,
  imagine: Imagine,
  energy: Energy,
  mean: jax.Array | None = None,
) -> Plan:
  """Searches for the plan of least energy, in one world.

  The result is the mean, never the best sample; the mean is not among the
  samples and elites do not stay, as published.

  Args:
    options: How.
    key: Of the samples.
    imagine: See `Imagine`.
    energy: See `Energy`.
    mean: `[H, A]` to begin at; None for no action.
  """
  count = len(options.bound)
  shape = options.iterations, options.samples, options.horizon, count
  if mean is None:
    mean = jnp.zeros(shape[2:])
  bound = jnp.asarray(options.bound, jnp.float32)

  def improve(state, noise):
    mean, deviation = state
    plans = jnp.clip(mean + deviation * noise, -bound, bound)
    plans = _close(options, plans)
    energies = energy(imagine(plans))  # [S]
    return _fit(options, plans, energies, mean, deviation), energies.min()

  noise = jax.random.normal(key, shape)
  deviation = jnp.broadcast_to(jnp.float32(options.deviation), shape[2:])
  (mean, _), energies = jax.lax.scan(improve, (mean, deviation), noise)
  actions = _close(options, mean)
  if options.gripper is not None:
    turn = actions[:, options.gripper]
    turn = jnp.where(jnp.abs(turn) < 0.25, 0.0, turn)
    actions = actions.at[:, options.gripper].set(turn)
  return Plan(actions, energies, mean)


def _close(options: Search, plans: jax.Array) -> jax.Array:
  """Overwrites the gripper's axis of `[..., H, A]` where it is to close."""
  if options.close_gripper is None:
    return plans
  return plans.at[..., options.close_gripper :, options.gripper].set(1.0)


def _fit(options, plans, energies, mean, deviation):
  """Fits mean and deviation `[H, A]` to plans `[S, H, A]`."""
  if options.method == 'cem':
    _, best = jax.lax.top_k(-energies, options.elites)
    elites = plans[best]
    found = elites.mean(axis=0)
    spread = elites.std(axis=0, ddof=min(1, options.elites - 1))
  else:
    weights = jax.nn.softmax(-energies / options.temperature)
    found = jnp.einsum('s,sha->ha', weights, plans)
    spread = deviation  # MPPI keeps it.
  kept = jnp.asarray(options.mean_momentum)
  mean = (1 - kept) * found + kept * mean
  kept = jnp.asarray(options.deviation_momentum)
  deviation = (1 - kept) * spread + kept * deviation
  return mean, jnp.maximum(deviation, options.least_deviation)


def shift(mean: jax.Array) -> jax.Array:
  """Moves plans `[..., H, A]` on by a step, to begin the next search at."""
  return jnp.concatenate([mean[..., 1:, :], 0 * mean[..., :1, :]], axis=-2)
