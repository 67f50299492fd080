"""Planning in the discs world: the ladder, what is imagined, pictures of both.

What `vjepa_jax.tools.plan_actions` does, and the end of `tasks/discs.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
import numpy as np

from vjepa_jax.plots import planning as pictures
from vjepa_jax.sets import discs
from vjepa_jax.world import acting, action_scores, ladder
from vjepa_jax.world.cloning import train_cloning
from vjepa_jax.world.imagination import ActionModel, imagine
from vjepa_jax.world.planning import Search

_SHOWN = 3  # episodes or landscapes of a picture
_HELD_OUT = 60  # episodes of play in the worlds of each task, nobody's data


class Play(NamedTuple):
  """Random play in all worlds, and its features."""

  frames: np.ndarray  # uint8 [n, T, h, w, 3]
  states: np.ndarray  # float32 [n, T, 2]
  actions: np.ndarray  # float32 [n, T, 2]
  features: np.ndarray  # float16 [n, T, N, D]


def encode_play(model: ActionModel, count: int, seed: int) -> Play:
  """Plays `count` episodes in the worlds of each task, and encodes them."""
  rng = np.random.default_rng((seed, 3))
  parts = [discs.play(name, count, rng) for name in discs.TASKS]
  frames, *rest = (np.concatenate(x) for x in zip(*parts, strict=True))
  encode = jax.jit(model.encode)
  features = [np.asarray(encode(model.params, x)) for x in frames]
  features = np.stack(features).astype(np.float16)
  flat = features.reshape(*features.shape[:2], -1, features.shape[-1])
  return Play(frames, *rest, flat)


def plan_in_discs(
  models: Mapping[str, ActionModel],
  output: epath.Path,
  searches: Mapping[str, Search],
  rungs: Sequence[str],
  *,
  episodes: int = 100,
  seeds: int = 1,
  num_play: int = 700,
) -> tuple[dict[str, Any], str]:
  """Climbs the ladder, and draws episodes and landscapes of 'ours'.

  Args:
    models: 'ours' and, for rungs that need it, 'untrained'.
    output: Folder of the pictures.
    searches: By task.
    rungs: Those of `ladder.RUNGS` that are climbed.
    episodes: Of each task and seed.
    seeds: Draws of tasks, of plans and of cloning.
    num_play: Episodes in the worlds of each task that cloning, and a decoder
      for the pictures, learn from.

  Returns:
    What results.json holds, and a table of it.
  """
  output.mkdir(parents=True, exist_ok=True)
  ours = models['ours']
  play = encode_play(ours, num_play, 0)
  decode = action_scores.fit_decoder(
    play.features.reshape(-1, *play.features.shape[2:]),
    play.frames.reshape(-1, *play.frames.shape[2:]),
  )
  clones = [None] * seeds
  if 'cloning' in rungs:
    clones = [
      train_cloning(play.features, play.actions, seed=seed)
      for seed in range(seeds)
    ]
  results = {'success': {}, 'seconds_per_action': {}, 'setup': {}}
  for name, search in searches.items():
    results['setup'][name] = _describe(name, search, episodes, seeds)
    success, seconds = {rung: [] for rung in rungs}, {}
    for seed, clone in enumerate(clones):
      tasks = discs.draw_tasks(name, episodes, seed)
      for rung in rungs:
        policy = ladder.make_policy(rung, name, search, models, clone, seed)
        episode = acting.run_episode(
          discs.Worlds(), tasks, policy, discs.BUDGET[name]
        )
        reached = episode.distances.min(axis=0) < discs.TOLERANCE
        logging.info('%s %d, %s: %.2f', name, seed, rung, reached.mean())
        success[rung].append(reached)
        seconds[rung] = episode.seconds
        if rung == 'model_ours' and not seed:
          _draw_episodes(
            output / name, ours, episode, policy, decode, search.window
          )
    results['success'][name] = {
      rung: acting.score(np.concatenate(x)) for rung, x in success.items()
    }
    results['seconds_per_action'][name] = seconds
  results |= _examine(ours, searches, output)
  pictures.draw_ladder(output / 'ladder.png', results['success'])
  return results, format_table(results)


def _describe(
  name: str, search: Search, episodes: int, seeds: int
) -> dict[str, Any]:
  """Says what success depends on, to stand beside it."""
  tasks = discs.draw_tasks(name, episodes, 0)
  far = discs.measure_distance(name, tasks.start, tasks.goal)
  return {
    'tasks': episodes * seeds,
    'budget': discs.BUDGET[name],
    'tolerance': discs.TOLERANCE,
    'goal_distance': [round(float(x), 2) for x in (far.min(), far.max())],
    'horizon': search.horizon,
    'samples': search.samples,
    'iterations': search.iterations,
    'energy': f'{search.energy}, L{search.loss_exp:g}',
  }


def _draw_episodes(path, model, episode, policy, decode, window) -> None:
  """Draws what was seen, wanted and, at the end of each plan, imagined."""

  @jax.jit
  def finish(params, frames, states, plans):
    features = model.encode(params, frames)
    ends = jax.vmap(
      lambda frame, state, plan: imagine(
        model, params, frame, state, plan[None], window
      )[0, -1]
    )
    return ends(features, states, plans)

  seen = episode.frames[:, :_SHOWN]
  imagined = [
    decode(finish(model.params, frames, states[:_SHOWN], plans[:_SHOWN]))
    for frames, states, plans in zip(
      seen, episode.states, policy.plans, strict=False
    )
  ]
  pictures.draw_episodes(
    path, seen, episode.goal[:_SHOWN], np.stack(imagined), fps=2
  )


def _examine(
  model: ActionModel, searches: Mapping[str, Search], output: epath.Path
) -> dict[str, Any]:
  """Measures rollouts and landscapes on play that nobody has seen."""
  play = encode_play(model, _HELD_OUT, 1)
  window = next(iter(searches.values())).window
  errors = action_scores.measure_rollouts(
    model, play.frames[:, :7], play.states[:, :7], play.actions[:, :7], window
  )
  # Where there is no wall and nothing in the way, in the worlds of reach.
  free = np.abs(np.diff(play.states, axis=1) - play.actions[:, :-1]).max(-1)
  rows = np.flatnonzero(free[:_HELD_OUT, 4] < 1e-3)
  found = action_scores.measure_landscape(
    model,
    play.frames[rows, 4:6],
    play.states[rows, 4],
    play.actions[rows, 4],
    discs.REACH,
  )
  truths = play.actions[rows, 4]
  pictures.draw_landscapes(
    output / 'landscape.png',
    found['grid'],
    found['energy'][:_SHOWN],
    truths[:_SHOWN],
    found['found'][:_SHOWN],
  )
  off = np.linalg.norm(found['found'] - truths, axis=1)
  landscape = {
    k: float(found[k].mean()) for k in ('zero', 'truth', 'least', 'rank')
  }
  return {
    'latent_error': errors,
    'landscape': landscape | {'action_error': float(off.mean())},
  }


def format_table(results: Mapping[str, Any]) -> str:
  """Formats success, rungs by tasks, and below what it depends on."""
  success = results['success']
  lines = [f'{"success":18}' + ''.join(f'{name:>20}' for name in success)]
  for rung in next(iter(success.values())):
    cells = (success[name][rung] for name in success)
    texts = (f'{x:.2f} [{low:.2f}, {high:.2f}]' for x, low, high in cells)
    lines.append(f'{rung:18}' + ''.join(f'{text:>20}' for text in texts))
  for name, setup in results['setup'].items():
    lines.append(
      f'{name}: {setup["tasks"]} tasks, {setup["budget"]} steps to come within '
      f'{setup["tolerance"]} of a goal '
      f'{setup["goal_distance"][0]}-{setup["goal_distance"][1]} away; plans of '
      f'{setup["horizon"]} steps, {setup["samples"]} samples x '
      f'{setup["iterations"]} iterations, energy {setup["energy"]}'
    )
  energy = results['landscape']
  lines.append(
    f'energy of no action {energy["zero"]:.3f}, of the truth '
    f'{energy["truth"]:.3f}, the least {energy["least"]:.3f}; '
    f'{energy["rank"]:.1%} of a grid have less than the truth'
  )
  return '\n'.join(lines)
