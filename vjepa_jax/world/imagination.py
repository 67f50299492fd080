"""What a model with actions imagines of plans.

The state of the robot is integrated outside the model, from the actions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.training.objectives.action import encode_frames, predict_frames


class ActionModel(NamedTuple):
  """An encoder and the action predictor that was trained on its features."""

  encoder: Encoder
  predictor: ActionPredictor
  params: dict[str, Any]  # 'encoder' and 'predictor', float32
  state_kind: str = 'plain'  # see `integrate`
  # Of use one step ahead alone: its rollouts were trained with a faulty loss.
  one_step: bool = False
  resolution: int | None = None  # height and width of its frames, if known

  def encode(self, params: dict[str, Any], frames: jax.Array) -> jax.Array:
    """Encodes frames uint8 `[n, h, w, 3]` to features `[n, H, W, D]`.

    `params` are `self.params`, passed on their own so that they may be traced.
    """
    return encode_frames(self.encoder, params['encoder'], frames[None])[0]


def integrate(state: jax.Array, action: jax.Array, kind: str) -> jax.Array:
  """Computes the state after an action, `[..., S]`.

  Args:
    state: 'plain' numbers, or a 'pose': a place, extrinsic x-y-z Euler angles
      in radians and, if there are more numbers, how far a gripper is closed.
    action: Differences, of the angles of a pose the rotation `R' R^T` about the
      axes of the base (`data.trajectories.compute_actions`).
    kind: 'plain', 'pose', or 'hidden': the model is shown 0.
  """
  if kind == 'hidden':
    return jnp.zeros_like(state)
  moved = state + action
  if kind == 'plain':
    return moved
  turn = make_rotation(action[..., 3:6]) @ make_rotation(state[..., 3:6])
  gripper = jnp.clip(moved[..., 6:7], 0.0, 1.0)
  parts = moved[..., :3], find_angles(turn), gripper, moved[..., 7:]
  return jnp.concatenate(parts, axis=-1)


def make_rotation(angles: jax.Array) -> jax.Array:
  """Makes `Rz Ry Rx` `[..., 3, 3]` of angles `[..., 3]` about x, y and z."""
  (cx, cy, cz), (sx, sy, sz) = (
    jnp.moveaxis(f(angles), -1, 0) for f in (jnp.cos, jnp.sin)
  )
  rows = (
    (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
    (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
    (-sy, cy * sx, cy * cx),
  )
  return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def find_angles(rotation: jax.Array) -> jax.Array:
  """Inverts `make_rotation`, the second angle from -pi / 2 to pi / 2."""
  r = rotation
  across = jnp.hypot(r[..., 0, 0], r[..., 1, 0])
  angles = (
    jnp.arctan2(r[..., 2, 1], r[..., 2, 2]),
    jnp.arctan2(-r[..., 2, 0], across),
    jnp.arctan2(r[..., 1, 0], r[..., 0, 0]),
  )
  return jnp.stack(angles, axis=-1)


def imagine(
  model: ActionModel,
  params: dict[str, Any],
  frame: jax.Array,
  state: jax.Array,
  plans: jax.Array,
  window: int | None = None,
) -> jax.Array:
  """Imagines the frames that follow if plans are carried out.

  Args:
    model: The model.
    params: `model.params`.
    frame: Features of what is seen, `[H, W, D]`.
    state: What is measured then, `[S]`.
    plans: Actions `[n, steps, A]`.
    window: Frames that a prediction is made of, at most; None for all of them,
      as published. Nothing of them is cached: for the one step of the paper
      there is nothing to keep, and for more a window bounds the work.

  Returns:
    Features `[n, steps, H * W, D]`.
  """
  count, steps, _ = plans.shape
  frames = jnp.broadcast_to(frame, (count, 1, *frame.shape))
  if model.state_kind == 'hidden':
    state = jnp.zeros_like(state)
  states = jnp.broadcast_to(state, (count, 1, *state.shape))
  for step in range(steps):
    first = max(0, step + 1 - (window or steps))
    following = predict_frames(
      model.predictor,
      params['predictor'],
      frames[:, first:],
      plans[:, first : step + 1],
      states[:, first:],
    )[:, -1:]
    frames = jnp.concatenate([frames, following], axis=1)
    moved = integrate(
      states[:, -1:], plans[:, step : step + 1], model.state_kind
    )
    states = jnp.concatenate([states, moved], axis=1)
  return frames[:, 1:].reshape(count, steps, -1, frame.shape[-1])
