"""The ladder of planning: what encoder, energy, model and planner each do.

True dynamics imagine what will really be seen: with them a failure is that of
the energy or of the search, and what a model loses against them is the model's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.models import tubelets as tub
from vjepa_jax.sets import discs
from vjepa_jax.training.objectives.targets import normalize_features
from vjepa_jax.world import planning

# From frames uint8 `[n, h, w, 3]` to features of the energy `[n, N, D]`.
Encode = Callable[[Any], jax.Array]


def encode_pixels(frames: jax.Array, patch: int, sigma: float = 0) -> jax.Array:
  """Takes the pixels of patches as features, blurred by `sigma` pixels."""
  x = frames.astype(jnp.float32) / 255.0
  if sigma:
    places = jnp.arange(x.shape[1])
    blur = jnp.exp(-0.5 * jnp.square((places[:, None] - places) / sigma))
    blur = blur / blur.sum(axis=1, keepdims=True)
    x = jnp.einsum('yr,xc,brck->byxk', blur, blur, x)
  return normalize_features(tub.patchify(x[:, None], (1, patch, patch)))


def look_by(encode: Encode) -> Callable[[discs.Scene], jax.Array]:
  """Returns what sees scenes `[...]` as features `[..., N, D]`."""

  def look(scene):
    frames = discs.render(scene, jnp)
    shape = frames.shape[:-3]
    features = encode(frames.reshape(-1, *frames.shape[-3:]))
    return features.reshape(*shape, *features.shape[1:])

  return look


def look_at_state(name: str) -> Callable[[discs.Scene], jax.Array]:
  """Returns what sees of a scene where that is which the task is about."""
  return lambda scene: (scene.disc if name == 'push' else scene.agent)[
    ..., None, :
  ]


def imagine_truly(
  scene: discs.Scene,
  plans: jax.Array,
  look: Callable[[discs.Scene], jax.Array],
) -> jax.Array:
  """Sees what plans `[S, H, 2]` really lead to, features `[S, H, N, D]`."""
  scene = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (len(plans), *x.shape)), scene
  )

  def step(scene, action):
    scene = discs.act(scene, action, jnp)
    return scene, scene

  _, scenes = jax.lax.scan(step, scene, plans.swapaxes(0, 1))
  return look(jax.tree.map(lambda x: x.swapaxes(0, 1), scenes))


def make_true_search(
  options: planning.Search,
  look: Callable[[discs.Scene], jax.Array],
  loss_exp: float = 1,
  of: str = 'last',
) -> Callable[..., planning.Plan]:
  """Makes the search by true dynamics, over worlds along the first axis.

  Returns:
    From keys, scenes, goals (scenes) and means `[n, H, A]` to plans.
  """

  def plan(key, scene, goal, mean):
    energy = planning.make_energy(look(goal), loss_exp, of)
    return planning.search(
      options,
      key,
      lambda plans: imagine_truly(scene, plans, look),
      energy,
      mean,
    )

  return jax.jit(lambda *worlds: jax.lax.map(lambda x: plan(*x), worlds))


def see_scenes(environment, observation, goal):
  """Shows a search by true dynamics the scenes themselves."""
  del observation, goal
  return environment.scene, environment.tasks.goal


def see_frames(environment, observation, goal):
  """Shows a search what a robot has: what is seen, and what is wanted."""
  del environment
  return observation, goal
