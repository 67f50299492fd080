"""Behaviour cloning: what play does by itself, told where to go.

The baseline of planning: a small network learns from play as the model's which
action was taken between two frames that are few steps apart. To act, the goal
takes the place of the second.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

_MOST_STEPS = 3  # between the two frames


class _Policy(nn.Module):
  """From features of what is seen and of the goal to an action."""

  action_dim: int
  width: int = 256

  @nn.compact
  def __call__(self, seen, goal):
    x = jnp.concatenate([seen, goal], axis=-1)
    for _ in range(2):
      x = nn.gelu(nn.Dense(self.width)(x))
    return nn.Dense(self.action_dim)(x)


def train_cloning(
  features: np.ndarray,
  actions: np.ndarray,
  *,
  seed: int,
  steps: int = 2000,
  batch_size: int = 128,
) -> Any:
  """Trains a policy on play.

  Args:
    features: Of frames, `[episodes, T, N, D]`, float16 will do.
    actions: That were taken then, `[episodes, T, A]`.
    seed: Of the initialisation and the batches.
    steps: Of training.
    batch_size: Pairs of frames a step.

  Returns:
    The policy, jitted: from features of what is seen and of the goal,
    `[n, N, D]`, to actions `[n, A]`.
  """
  features = features.reshape(*features.shape[:2], -1)
  scale = np.abs(actions).max()
  policy = _Policy(actions.shape[-1])
  rng = np.random.default_rng(seed)
  schedule = optax.cosine_decay_schedule(1e-3, steps)
  tx = optax.adamw(schedule, weight_decay=0.01)

  def loss(params, seen, goal, action):
    return jnp.square(policy.apply(params, seen, goal) - action).mean()

  @jax.jit
  def train_step(params, opt_state, batch):
    gradient = jax.grad(loss)(params, *batch)
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  empty = jnp.zeros((1, features.shape[-1]))
  params = jax.jit(policy.init)(jax.random.key(seed), empty, empty)
  opt_state = tx.init(params)
  for _ in range(steps):
    ahead = rng.integers(1, _MOST_STEPS + 1, batch_size)
    rows = rng.integers(len(features), size=batch_size)
    first = rng.integers(features.shape[1] - ahead)
    batch = (
      np.float32(features[rows, first]),
      np.float32(features[rows, first + ahead]),
      actions[rows, first] / scale,
    )
    params, opt_state = train_step(params, opt_state, batch)

  @jax.jit
  def act(seen, goal):
    flat = (x.reshape(len(x), -1) for x in (seen, goal))
    return policy.apply(params, *flat) * scale

  return act
