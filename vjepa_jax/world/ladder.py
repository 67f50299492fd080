"""The ladder of planning: what encoder, energy, model and planner each do.

Its rungs, on the same tasks: chance; cloning of the play; true dynamics, which
imagine what will really be seen, with one energy after the other; models; and
true dynamics with the true distance. With true dynamics a failure is that of
the energy or of the search, and what a model loses against them is the model's.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import tubelets as tub
from vjepa_jax.sets import discs
from vjepa_jax.training.objectives.targets import normalize_features
from vjepa_jax.world import acting, planning
from vjepa_jax.world.imagination import ActionModel

RUNGS = (
  'random',
  'cloning',
  'true_pixels',
  'true_blurred',
  'true_untrained',
  'true_ours',
  'model_untrained',
  'model_ours',
  'true_state',
)
# Steps of a plan: a door is far.
HORIZON = {'reach': 3, 'push': 3, 'door': 6}
_BLUR = 4.0  # deviation, pixels
_PATCH = 8  # side of those whose pixels are features


def make_search(name: str, **fields: Any) -> planning.Search:
  """Makes the search for the actions of a task; `fields` replace its own.

  The energy is that of all frames of a plan: who counts the last one alone
  puts off going there, as it is as good to go later.
  """
  two = (0.0, 0.0)
  own = {
    'horizon': HORIZON[name],
    'samples': 64,
    'iterations': 3,
    'elites': 8,
    'energy': 'sum',
    'window': 2,
  }
  return planning.Search(
    **(own | fields),
    bound=(discs.REACH,) * 2,
    deviation=(discs.REACH,) * 2,
    mean_momentum=two,
    deviation_momentum=two,
  )


# From frames uint8 `[n, h, w, 3]` to features of the energy `[n, N, D]`.
Encode = Callable[[Any], jax.Array]


def encode_pixels(frames: jax.Array, sigma: float = 0) -> jax.Array:
  """Takes the pixels of patches as features, blurred by `sigma` pixels."""
  x = frames.astype(jnp.float32) / 255.0
  if sigma:
    places = jnp.arange(x.shape[1])
    blur = jnp.exp(-0.5 * jnp.square((places[:, None] - places) / sigma))
    blur = blur / blur.sum(axis=1, keepdims=True)
    x = jnp.einsum('yr,xc,brck->byxk', blur, blur, x)
  return normalize_features(tub.patchify(x[:, None], (1, _PATCH, _PATCH)))


def look_by(encode: Encode) -> Callable[[discs.Scene], jax.Array]:
  """Returns what sees scenes `[...]` as features `[..., N, D]`."""

  def look(scene):
    frames = discs.render(scene, jnp)
    shape = frames.shape[:-3]
    features = encode(frames.reshape(-1, *frames.shape[-3:]))
    return features.reshape(*shape, *features.shape[1:])

  return look


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
  options: planning.Search, look: Callable[[discs.Scene], jax.Array]
) -> Callable[..., planning.Plan]:
  """Makes the search by true dynamics, over worlds along the first axis.

  Returns:
    From keys, scenes, goals (scenes) and means `[n, H, A]` to plans.
  """

  def plan(key, scene, goal, mean):
    energy = planning.make_energy(options, look(goal))
    imagine = functools.partial(imagine_truly, scene, look=look)
    return planning.search(options, key, imagine, energy, mean)

  return jax.jit(lambda *worlds: jax.lax.map(lambda x: plan(*x), worlds))


def see_scenes(environment, observation, goal):
  """Shows a search by true dynamics the scenes themselves."""
  del observation, goal
  return environment.scene, environment.tasks.goal


def see_frames(environment, observation, goal):
  """Shows a search what a robot has: what is seen, and what is wanted."""
  del environment
  return observation, goal


def make_policy(
  rung: str,
  name: str,
  options: planning.Search,
  models: Mapping[str, ActionModel],
  clone: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
  seed: int = 0,
) -> acting.Policy:
  """Makes the policy of a rung.

  Args:
    rung: One of `RUNGS`.
    name: Of the task.
    options: Of the search, the same on all rungs.
    models: 'ours' and 'untrained', of which a rung may need one.
    clone: From features of what is seen and of the goal to actions, in the
      features of 'ours'.
    seed: Of what is drawn.
  """
  if rung == 'random':
    rng = np.random.default_rng(seed)
    return lambda worlds, seen, goal: rng.uniform(
      -discs.REACH, discs.REACH, (len(seen.frames), 2)
    )
  if rung == 'cloning':
    return functools.partial(_follow_clone, models['ours'], clone)
  kind, _, of = rung.partition('_')
  if kind == 'model':
    plan, see = acting.make_model_search(models[of], options), see_frames
  else:
    look = _make_look(of, name, models.get(of))
    plan, see = make_true_search(options, look), see_scenes
  shape = options.horizon, len(options.bound)
  return acting.Planner(plan, see, shape, seed)


def _follow_clone(model, clone, worlds, seen, goal):
  """Does what a clone of play does, see `acting.Policy`."""
  del worlds
  pair = (jax.jit(model.encode)(model.params, x.frames) for x in (seen, goal))
  return np.asarray(clone(*pair))


def _make_look(of, name, model):
  """Makes what true dynamics are seen by."""
  if of == 'state':
    return lambda scene: (scene.disc if name == 'push' else scene.agent)[
      ..., None, :
    ]
  if model is None:
    sigma = _BLUR if of == 'blurred' else 0.0
    return look_by(functools.partial(encode_pixels, sigma=sigma))

  def encode(frames):
    features = model.encode(model.params, frames)
    return features.reshape(len(features), -1, features.shape[-1])

  return look_by(encode)
