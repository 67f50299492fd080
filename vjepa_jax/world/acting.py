"""Acting: look, plan, take the first step of the plan, and look again.

A robot needs no more than an `Environment` of its own; worlds that are
simulated side by side are one environment, with as many rows as worlds.
"""

from collections.abc import Callable
import math
import time
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.world import planning
from vjepa_jax.world.imagination import ActionModel, imagine


class Observation(NamedTuple):
  """What is seen and measured."""

  frames: np.ndarray  # uint8 [n, h, w, 3]
  states: np.ndarray  # float32 [n, S]


class Environment(Protocol):
  """A robot, or worlds side by side."""

  def reset(self, task: Any) -> Any:
    """Begins a task; returns the `Observation` that is its goal."""

  def observe(self) -> Any:
    """Returns the `Observation` there is."""

  def act(self, actions: np.ndarray) -> None:
    """Takes an action `[n, A]`, and waits until it is carried out."""


# From the environment, what is observed and the goal to actions `[n, A]`.
Policy = Callable[[Environment, Any, Any], np.ndarray]


class Episode(NamedTuple):
  """What came of a policy, over its steps and the observation before them."""

  frames: np.ndarray  # uint8 [steps + 1, n, h, w, 3]
  states: np.ndarray  # float32 [steps + 1, n, S]
  goal: np.ndarray  # uint8 [n, h, w, 3]
  distances: np.ndarray  # [steps + 1, n], of environments that measure it
  seconds: float  # an action, the median: the first one compiles


def run_episode(
  environment: Environment, task: Any, policy: Policy, steps: int
) -> Episode:
  """Lets a policy act for some steps."""
  goal = environment.reset(task)
  measure = getattr(environment, 'distance', lambda: np.full(1, np.nan))
  seen, distances, times = [environment.observe()], [measure()], []
  for _ in range(steps):
    start = time.perf_counter()
    actions = policy(environment, seen[-1], goal)
    times.append((time.perf_counter() - start) / len(actions))
    environment.act(actions)
    seen.append(environment.observe())
    distances.append(measure())
  frames, states = (np.stack(x) for x in zip(*seen, strict=True))
  seconds = float(np.median(times))
  return Episode(frames, states, goal.frames, np.stack(distances), seconds)


def score(successes: np.ndarray) -> list[float]:
  """Computes the share of successes and its 95 % interval (Wilson's)."""
  count, share = successes.size, float(successes.mean())
  z = 1.959964
  middle = (share + z * z / (2 * count)) / (1 + z * z / count)
  half = z / (1 + z * z / count)
  half *= math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
  return [share, max(0.0, middle - half), min(1.0, middle + half)]


class Planner:
  """A policy that plans anew at each step, from where the last plan ended.

  `plan` takes keys `[n]`, what there is and what is wanted, as `see` makes them
  of an environment and its observations, and means `[n, H, A]`.
  """

  def __init__(
    self,
    plan: Callable[..., planning.Plan],
    see: Callable[..., tuple[Any, Any]],
    shape: tuple[int, int],
    seed: int,
    warm_start: bool = True,
  ) -> None:
    """Begins without a plan; `shape` is that of one, steps by axes."""
    self._plan, self._see, self._shape = plan, see, shape
    self._warm_start = warm_start
    self._key, self._goal = jax.random.key(seed), None
    self.plans: list[np.ndarray] = []  # [n, H, A], of each step

  def __call__(self, environment, observation, goal):
    """See `Policy`."""
    count = len(observation.frames)
    if goal is not self._goal or not self._warm_start:
      self._goal = goal
      self._mean = jnp.zeros((count, *self._shape))
    self._key, key = jax.random.split(self._key)
    plan = self._plan(
      jax.random.split(key, count),
      *self._see(environment, observation, goal),
      self._mean,
    )
    self._mean = planning.shift(plan.mean)
    self.plans.append(np.asarray(plan.actions))
    return np.asarray(plan.actions[:, 0])


def make_model_search(
  model: ActionModel,
  options: planning.Search,
  axes: tuple[int, ...] | None = None,
) -> Callable[..., planning.Plan]:
  """Makes the search by what a model imagines, over worlds in turn.

  Args:
    model: The model.
    options: Of the search.
    axes: Which numbers of an action are searched for, the others are 0; None
      for all. The paper searches 0, 1, 2 and 6: rotations stay.

  Returns:
    From keys `[n]`, observations, goals (observations) and means to plans.

  Raises:
    UserError: The model is of use one step ahead alone.
  """
  if model.one_step and options.horizon > 1:
    raise UserError(
      'rollouts of the released V-JEPA 2-AC were trained with a faulty loss: '
      'plan with --horizon=1, or give --allow_rollouts'
    )
  axes = axes or tuple(range(model.predictor.action_dim))

  @jax.jit
  def plan(params, keys, seen, goal, means):
    frames = model.encode(params, seen.frames)
    goals = model.encode(params, goal.frames)
    goals = goals.reshape(len(goals), -1, goals.shape[-1])

    def plan_one(world):
      key, frame, state, goal, mean = world

      def imagine_plans(plans):
        shape = *plans.shape[:2], model.predictor.action_dim
        plans = jnp.zeros(shape).at[..., jnp.array(axes)].set(plans)
        return imagine(model, params, frame, state, plans, options.window)

      energy = planning.make_energy(options, goal)
      return planning.search(options, key, imagine_plans, energy, mean)

    return jax.lax.map(plan_one, (keys, frames, seen.states, goals, means))

  def check_and_plan(keys, seen, goal, means):
    for frames in (seen.frames, goal.frames):
      if model.resolution and frames.shape[1:3] != (model.resolution,) * 2:
        raise UserError(
          f'frames of {frames.shape[1]} x {frames.shape[2]} pixels: crop and '
          f'resize them to {model.resolution} x {model.resolution}, as the '
          'model was trained'
        )
    return plan(model.params, keys, seen, goal, means)

  return check_and_plan
