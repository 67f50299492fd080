"""Pictures of planning: the ladder, energies of actions, episodes."""

from collections.abc import Mapping, Sequence

from etils import epath
from matplotlib import figure
import numpy as np

from vjepa_jax.plots.figures import save
from vjepa_jax.plots.prediction import draw_strip, write_side_by_side


def draw_ladder(
  path: epath.PathLike, success: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
  """Draws shares of success with their intervals, to a PNG.

  Args:
    path: PNG to write.
    success: By task and rung: share, and its interval from low to high.
  """
  fig = figure.Figure(figsize=(4 * len(success), 3.6), layout='constrained')
  panels = fig.subplots(1, len(success), squeeze=False, sharey=True)[0]
  longest_first = sorted(success.values(), key=len, reverse=True)
  shown = list(dict.fromkeys(rung for x in longest_first for rung in x))
  places = np.arange(len(shown))
  for axis, (name, rungs) in zip(panels, success.items(), strict=True):
    values = [rungs.get(rung, (np.nan,) * 3) for rung in shown]
    mean, low, high = np.array(values).T
    error = np.maximum([mean - low, high - mean], 0)
    axis.barh(places, mean, xerr=error, color='#1f6fb4', ecolor='#57606a')
    axis.set(title=name, xlim=(0, 1), xlabel='success')
    axis.set_yticks(places, [rung.replace('_', ' ') for rung in shown])
  panels[0].invert_yaxis()  # Shared by all.
  save(fig, path)


def draw_landscapes(
  path: epath.PathLike,
  grid: np.ndarray,
  energies: np.ndarray,
  truths: np.ndarray,
  found: np.ndarray,
) -> None:
  """Draws the energy of actions, the true one and the least marked, to a PNG.

  Args:
    path: PNG to write.
    grid: Of the actions along both axes, `[points]`.
    energies: `[n, points, points]`, the first axis first.
    truths: Actions that were taken, `[n, 2]`.
    found: Actions of least energy, the same.
  """
  fig = figure.Figure(figsize=(3 * len(energies), 3), layout='constrained')
  panels = fig.subplots(1, len(energies), squeeze=False)[0]
  for axis, energy, truth, least in zip(
    panels, energies, truths, found, strict=True
  ):
    image = axis.pcolormesh(grid, grid, energy.T, shading='nearest')
    axis.plot(*truth, 'r+', markersize=12, label='truth')
    axis.plot(*least, 'wx', label='least energy')
    axis.set(aspect='equal', xlabel='first axis', ylabel='second axis')
    axis.invert_yaxis()  # As frames are.
    fig.colorbar(image, ax=axis, shrink=0.7)
  panels[0].legend(fontsize=7, loc='upper left')
  save(fig, path)


def draw_episodes(
  path: epath.Path,
  seen: np.ndarray,
  goal: np.ndarray,
  imagined: np.ndarray,
  fps: float,
) -> None:
  """Draws episodes to a PNG, and the first of them to a GIF and an MP4.

  In the PNG the goal stands at the end of the row of plans.

  Args:
    path: What to write, without suffix.
    seen: `[T, n, h, w, 3]`, 0..255.
    goal: `[n, h, w, 3]`.
    imagined: The end of each plan, `[T - 1, n, h, w, 3]`.
    fps: Steps a second of the film.
  """
  clips = {}
  for i in range(len(goal)):
    clips |= {
      f'seen {i}': seen[:, i],
      f'plans, goal {i}': [*imagined[:, i], goal[i]],
    }
  draw_strip(f'{path}.png', clips, len(seen))
  film = {
    'seen': seen[:, 0],
    'end of the plan': imagined[:, 0],
    'goal': np.repeat(goal[:1], len(seen), axis=0),
  }
  write_side_by_side(path, film, fps)
