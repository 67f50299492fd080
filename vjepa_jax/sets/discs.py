"""The discs set: a world of discs to act in, and films of random play in it.

An agent, a red disc in a unit square, is moved by up to `REACH` a step along
each axis. It pushes another disc out of its way, and stops at walls. A single
frame shows all there is to know, and nothing goes on by itself, so that three
tasks are well defined by a picture of their goal:
- reach: be somewhere else, nothing in between;
- push: bring the other disc somewhere, straight ahead;
- door: be in the other room. The door is not where the goal is: going straight
  for it ends at the wall.

What happens and what it looks like are written for numpy and for jax.numpy
(`xp`): true dynamics can be planned with as a model can. Films are real encoded
episodes, `train/*.mp4` with the states beside them in `train/*.npz`.
"""

import itertools
import pathlib
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.encode import write_video
from vjepa_jax.errors import UserError
from vjepa_jax.sets import writing

TASKS = ('reach', 'push', 'door')
REACH = 0.15  # of a step along an axis, in sides of the square
TOLERANCE = 0.05  # distance to the goal that counts as there
BUDGET = {'reach': 10, 'push': 10, 'door': 20}  # steps to get there
SIZE = 32  # pixels of a side
FRAMES = 16
FPS = 4

# A change of these numbers changes the set: raise the version with them.
_VERSION = 1
_RADIUS = 0.09
_WALL = 0.04  # half of its thickness
_GAP = 0.14  # half of the door's width
_TOGETHER = 20  # episodes
_DETOUR = (0.18, 0.32)  # from straight ahead to the door
_SUBSTEPS = 4  # of a step, so that nothing passes through
_ABSENT = (-9.0, -9.0)  # where a disc is that is not there
_OPEN = (0.5, 9.0)  # a door as wide as the world: no wall
_GREY, _RED, _BLUE, _DARK = (
  np.array(colour, np.float32)
  for colour in ((200, 200, 190), (215, 50, 45), (45, 90, 220), (60, 60, 70))
)


class Scene(NamedTuple):
  """All there is to know, of one world or of many along leading axes."""

  agent: Any  # float32 [..., 2], x to the right and y down, 0..1
  disc: Any  # float32 [..., 2], the same
  door: Any  # float32 [..., 2]: y of its middle, half of its width


class Tasks(NamedTuple):
  """Tasks of one kind, along the first axis."""

  name: str
  start: Scene
  goal: Scene


class Observation(NamedTuple):
  """What is seen and measured."""

  frames: np.ndarray  # uint8 [n, SIZE, SIZE, 3]
  states: np.ndarray  # float32 [n, 2], of the agent


def act(scene: Scene, action: Any, xp: ModuleType = np) -> Scene:
  """Computes what an action `[..., 2]` does; beyond `REACH` it is clipped."""
  step = xp.clip(xp.asarray(action, xp.float32), -REACH, REACH) / _SUBSTEPS
  agent, disc, door = scene
  for _ in range(_SUBSTEPS):
    agent = _stay_in(agent + step, xp)
    for low, high in ((-9.0, door[..., 0] - door[..., 1]), (door.sum(-1), 9.0)):
      agent = _stay_out(agent, low, high, xp)
    # Pushed out of the way, to where there is room; the agent stays behind it.
    away, gap = _compare(disc, agent, xp)
    pushed = _stay_in(disc + away * xp.maximum(2 * _RADIUS - gap, 0), xp)
    disc = xp.where(gap < 2 * _RADIUS, pushed, disc)
    away, gap = _compare(agent, disc, xp)
    agent = _stay_in(agent + away * xp.maximum(2 * _RADIUS - gap, 0), xp)
  return Scene(agent, disc, door)


def _compare(a, b, xp):
  """Returns the direction from b to a, and the distance `[..., 1]`."""
  gap = xp.sqrt(xp.square(a - b).sum(-1, keepdims=True) + 1e-12)
  return (a - b) / gap, gap


def _stay_in(place, xp):
  return xp.clip(place, _RADIUS, 1 - _RADIUS)


def _stay_out(place, low, high, xp):
  """Pushes a disc out of the part of the wall between two heights."""
  x, y = place[..., 0], place[..., 1]
  nearest = xp.stack(
    [
      xp.clip(x, 0.5 - _WALL, 0.5 + _WALL),
      xp.minimum(xp.maximum(y, low), xp.maximum(low, high)),
    ],
    axis=-1,
  )
  away, gap = _compare(place, nearest, xp)
  return place + away * xp.maximum(_RADIUS - gap, 0)


def render(scene: Scene, xp: ModuleType = np, size: int = SIZE) -> Any:
  """Renders frames uint8 `[..., size, size, 3]`."""
  pixels = (xp.arange(size, dtype=xp.float32) + 0.5) / size
  x, y = pixels[None, :], pixels[:, None]

  def blend(frame, distance, colour):
    alpha = xp.clip(0.5 - size * distance, 0, 1)[..., None]
    return frame + alpha * (colour - frame)

  middle, half = (scene.door[..., i, None, None] for i in (0, 1))
  wall = xp.maximum(xp.abs(x - 0.5) - _WALL, half - xp.abs(y - middle))
  frame = blend(_GREY, wall, _DARK)
  for place, colour in ((scene.disc, _BLUE), (scene.agent, _RED)):
    place = place[..., None, None, :]
    distance = xp.hypot(x - place[..., 0], y - place[..., 1])
    frame = blend(frame, distance - _RADIUS, colour)
  return xp.round(frame).astype(xp.uint8)


def measure_distance(name: str, scene: Scene, goal: Scene, xp=np) -> Any:
  """Measures how far scenes `[...]` are from the goal of a task."""
  if name == 'push':
    difference = scene.disc - goal.disc
  else:
    difference = scene.agent - goal.agent
  return xp.sqrt(xp.square(difference).sum(-1))


class Worlds:
  """As many worlds as there are tasks, side by side: an environment.

  A robot has the same three methods, for one task; `distance` is for the score.
  """

  def reset(self, tasks: Tasks) -> Observation:
    """Begins tasks; returns the goal, as it would be observed there."""
    self.tasks, self.scene = tasks, tasks.start
    return Observation(render(tasks.goal), tasks.goal.agent)

  def observe(self) -> Observation:
    """Looks at the worlds."""
    return Observation(render(self.scene), self.scene.agent)

  def act(self, actions: np.ndarray) -> None:
    """Takes one action `[n, 2]` in each world, and waits for its end."""
    self.scene = act(self.scene, np.asarray(actions, np.float32))

  def distance(self) -> np.ndarray:
    """Measures how far each world is from its goal, `[n]`."""
    return measure_distance(self.tasks.name, self.scene, self.tasks.goal)


def _draw(name: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
  """Draws a start and a goal until they make a task of that kind."""
  while True:
    agent = rng.uniform(_RADIUS, 1 - _RADIUS, 2)
    angle = rng.uniform(0, 2 * np.pi)
    way = np.array([np.cos(angle), np.sin(angle)])
    disc, door = np.array(_ABSENT), np.array(_OPEN)
    target, moved = agent + rng.uniform(0.25, 0.6) * way, disc
    if name == 'push':
      disc = agent + (2 * _RADIUS + rng.uniform(0.02, 0.1)) * way
      moved = disc + rng.uniform(0.15, 0.3) * way
      target = moved - 2 * _RADIUS * way
    elif name == 'door':
      door = np.array([rng.uniform(0.25, 0.75), _GAP])
      target = rng.uniform(_RADIUS, 1 - _RADIUS, 2)
    inside = [target, moved] if name == 'push' else [target]
    if any(np.abs(place - 0.5).max() > 0.5 - _RADIUS for place in inside):
      continue
    if name == 'door':
      (x0, y0), (x1, y1) = agent, target
      sides = (x0 - 0.5) * (x1 - 0.5)
      if sides > 0 or min(abs(x0 - 0.5), abs(x1 - 0.5)) < _WALL + _RADIUS:
        continue
      # Straight ahead is wall, and the door is not on the way along it.
      crossing = y0 + (y1 - y0) * (0.5 - x0) / (x1 - x0)
      misses = np.array([crossing, y1]) - door[0]
      misses *= np.sign(misses[0])
      if misses.min() < _DETOUR[0] or misses.max() > _DETOUR[1]:
        continue
    scenes = Scene(agent, disc, door), Scene(target, moved, door)
    return tuple(Scene(*map(np.float32, scene)) for scene in scenes)


def draw_tasks(name: str, count: int, seed: int) -> Tasks:
  """Draws tasks; the same name, count and seed give the same ones.

  Raises:
    UserError: There is no such task.
  """
  if name not in TASKS:
    raise UserError(f'task {name!r} is not one of {", ".join(TASKS)}')
  rng = np.random.default_rng((seed, 2, TASKS.index(name)))
  pairs = [_draw(name, rng) for _ in range(count)]
  starts, goals = zip(*pairs, strict=True)
  return Tasks(name, _stack(starts), _stack(goals))


def _stack(scenes):
  return Scene(*map(np.stack, zip(*scenes, strict=True)))


def play(
  name: str, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Plays at random in the worlds of a task, without a goal.

  The agent keeps its way for some steps, or until it is stopped, and then takes
  another, as play does and independent draws do not.

  Returns:
    Frames uint8 `[count, FRAMES, SIZE, SIZE, 3]`, states float32
    `[count, FRAMES, 2]` and the actions that were taken, the last of them 0,
    float32 `[count, FRAMES, 2]`.
  """
  scenes = [_stack([_draw(name, rng)[0] for _ in range(count)])]
  actions = np.zeros((count, FRAMES, 2), np.float32)
  way, turns = np.zeros((count, 2)), np.ones((count, 1), bool)
  for i in range(FRAMES - 1):
    new = rng.uniform(-REACH, REACH, (count, 2))
    way = np.where(turns, new, way)
    jitter = rng.normal(0, 0.02, (count, 2))
    actions[:, i] = np.clip(way + jitter, -REACH, REACH)
    scenes.append(act(scenes[-1], actions[:, i]))
    moved = scenes[-1].agent - scenes[-2].agent
    stopped = np.abs(moved - actions[:, i]).max(axis=1) > 1e-3
    turns = (stopped | (rng.random(count) < 0.2))[:, None]
  scenes = Scene(*(np.stack(x, axis=1) for x in zip(*scenes, strict=True)))
  return render(scenes), scenes.agent, actions


def write_discs_set(
  folder: pathlib.Path | str, *, num_train: int = 3000, seed: int = 0
) -> pathlib.Path:
  """Writes episodes of random play, a third in the worlds of each task.

  Writes `train/*.mp4` with `train/*.npz` (`states` float32 `[T, 2]`,
  `timestamps` float64 `[T]`, seconds, `actions` float32 `[T, 2]`), the manifest
  `train.csv` and, last, `discs.json`: a folder that has it is finished and,
  when the options agree, is left alone.

  Args:
    folder: Where to write.
    num_train: Episodes.
    seed: The same seed and options give the same films.

  Returns:
    `folder`.

  Raises:
    UserError: The number is not positive, or `folder` holds a finished set with
      other options.
  """
  if num_train < 1:
    raise UserError(f'num_train={num_train} must be positive')
  folder = pathlib.Path(folder)
  options = {
    'version': _VERSION,
    'frames': FRAMES,
    'size': SIZE,
    'fps': FPS,
    'seed': seed,
    'num_train': num_train,
  }

  def write_part(first):
    """Writes some episodes; together they are simulated faster."""
    rng = np.random.default_rng((seed, 0, first))
    count = min(_TOGETHER, num_train - first)
    name = TASKS[first // _TOGETHER % len(TASKS)]
    names = []
    for i, episode in enumerate(zip(*play(name, count, rng), strict=True)):
      frames, states, actions = episode
      path = folder / f'train/{first + i:05d}.mp4'
      write_video(path, frames, FPS, causal=True)
      with path.with_suffix('.npz').open('wb') as file:
        np.savez(file, states=states, timestamps=times, actions=actions)
      names.append(f'train/{path.name}\n')
    return names

  times = np.arange(FRAMES) / FPS

  def write():
    writing.clear_split(folder, 'train')
    parts = range(0, num_train, _TOGETHER)
    names = writing.map_in_threads(write_part, parts, unit='part')
    storage.replace(folder / 'train.csv', ''.join(itertools.chain(*names)))

  writing.write_once(folder / 'discs.json', options, write)
  return folder
