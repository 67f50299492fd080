"""The physics set: films of a small world, and twins that break its rules.

An object drifts across a box, bounces off its walls and, in half of the films,
passes behind a screen. An object has a state: whether it is there, its shape,
its colour, its row, the way it moves. In a possible film the state stays what
it is; in an impossible one it switches to another at one moment, in plain
sight or behind the screen.

Films come in sets of four, as in IntPhys (arXiv 1803.07616): from two states a
and b the possible films a-a and b-b and the impossible ones a-b and b-a. Each
frame of an impossible film is a frame of a possible one of its set, so that no
frame by itself, and neither the beginnings nor the ends, tell them apart. The
two films of a pair, (a-a, a-b) and (b-b, b-a), are the same until the switch
shows.
"""

import itertools
import pathlib
from typing import NamedTuple

import cv2
import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.encode import write_video
from vjepa_jax.errors import UserError
from vjepa_jax.sets import writing

# What is violated: an object vanishes or comes out of nothing, changes its
# shape or its colour, jumps to another row, turns back without a wall.
PROPERTIES = ('permanence', 'shape', 'colour', 'position', 'direction')
SHAPES = ('disc', 'square', 'triangle')
FRAMES = 32
SIZE = 48
FPS = 8
COLUMNS = ('file', 'pair', 'set', 'property', 'screen', 'possible', 'frame')

_KINDS = tuple(itertools.product(PROPERTIES, (False, True)))  # with a screen?

# A change of these numbers changes the set: raise the version with them.
_VERSION = 1
_WALL = 3.0  # pixels from the edge, what the crop of evaluation takes away
_RADIUS = (5.0, 6.0)
_SPEED = (1.2, 1.8)  # pixels a frame along the row
_SLANT = 0.4  # pixels a frame across it, at most
_MOMENT = (13, 19)  # the switch comes before one of these frames
_HUES = np.array(
  [
    *([225, 45, 40], [245, 150, 20], [235, 225, 50]),
    *([45, 190, 60], [40, 110, 235], [170, 60, 215]),
  ],
  np.float32,
)


class _State(NamedTuple):
  """What may not change without a reason."""

  present: bool  # there is an object
  shape: int  # index in SHAPES
  hue: int  # index of its colour
  row: float  # height of its path at the moment, pixels
  speed: float  # pixels a frame to the right


class _Scene(NamedTuple):
  """What the films of a set share."""

  background: np.ndarray  # float32 [SIZE, SIZE, 3], 0..255
  screen: tuple[float, float] | None  # its left and right edge, pixels
  screen_colour: np.ndarray  # float32 [3]
  radius: float  # of the object, pixels
  slant: float  # its speed downwards, pixels a frame
  middle: float  # where it is at the moment, pixels from the left
  moment: int  # first frame of the second state


def write_physics_set(
  folder: pathlib.Path | str,
  *,
  num_train: int = 2000,
  num_sets: int = 16,
  seed: int = 0,
) -> pathlib.Path:
  """Writes the films, their manifests and their description.

  Writes `train/*.mp4`, possible films alone, with the manifest `train.csv` that
  pretraining reads; `test/*.mp4` with `test.csv` (columns `COLUMNS`; `frame` is
  the first frame in which the films of a pair differ, and `screen` says whether
  the switch is hidden); and, last, `physics.json`: a folder that has it is
  finished and, when the options agree, is left alone.

  Args:
    folder: Where to write.
    num_train: Training films.
    num_sets: Sets of four films for each property, with a screen and without.
    seed: The same seed and options give the same films.

  Returns:
    `folder`.

  Raises:
    UserError: A number is not positive, or `folder` holds a finished set with
      other options.
  """
  if min(num_train, num_sets) < 1:
    raise UserError(
      f'num_train={num_train} and num_sets={num_sets} must be positive'
    )
  folder = pathlib.Path(folder)
  options = {
    'version': _VERSION,
    'properties': list(PROPERTIES),
    'frames': FRAMES,
    'size': SIZE,
    'fps': FPS,
    'seed': seed,
    'num_train': num_train,
    'num_sets': num_sets,
  }

  def write():
    for split in ('train', 'test'):
      writing.clear_split(folder, split)
    _write_train(folder / 'train.csv', num_train, seed)
    _write_test(folder / 'test.csv', num_sets, seed)

  writing.write_once(folder / 'physics.json', options, write)
  return folder


def _write_train(manifest, num_films, seed):
  """Writes possible films, drawn as those of the sets are."""

  def write(i):
    rng = np.random.default_rng((seed, 0, i))
    scene, *states = _draw(*_KINDS[i % len(_KINDS)], rng)
    film = _render(scene, states[i // len(_KINDS) % 2])
    return _write_film(manifest, i, film)

  names = writing.map_in_threads(write, range(num_films), unit='training film')
  storage.replace(manifest, ''.join(f'{name}\n' for name in names))


def _write_test(manifest, num_sets, seed):
  """Writes the films of all sets, and what they are."""

  def write(i):
    property_name, screen = _KINDS[i % len(_KINDS)]
    rng = np.random.default_rng((seed, 1, i))
    films = render_set(property_name, screen, rng)
    rows = []
    for k, film in enumerate(films):
      pair, possible = 2 * i + k // 2, k % 2 == 0
      twin = films[k + 1 if possible else k - 1]
      frame = (film != twin).any(axis=(1, 2, 3)).argmax()
      name = _write_film(manifest, 4 * i + k, film)
      kind = property_name, int(screen), int(possible)
      rows.append((name, pair, i, *kind, frame))
    return rows

  sets = writing.map_in_threads(
    write, range(num_sets * len(_KINDS)), unit='set'
  )
  rows = [COLUMNS, *itertools.chain(*sets)]
  lines = [','.join(map(str, row)) + '\n' for row in rows]
  storage.replace(manifest, ''.join(lines))


def _write_film(manifest, number, film):
  """Writes a film into the folder of its split; returns its name."""
  name = f'{manifest.stem}/{number:05d}.mp4'
  # The codec may not tell of the future either.
  write_video(manifest.parent / name, film, FPS, causal=True)
  return name


def render_set(
  property_name: str, screen: bool, rng: np.random.Generator
) -> list[np.ndarray]:
  """Renders the four films of a set: a-a, a-b, b-b, b-a.

  Args:
    property_name: One of `PROPERTIES`.
    screen: Whether the switch happens behind a screen.
    rng: Draws the scene and the two states.

  Returns:
    Four times uint8 `[FRAMES, SIZE, SIZE, 3]`.
  """
  scene, a, b = _draw(property_name, screen, rng)
  film_a, film_b = _render(scene, a), _render(scene, b)
  films = []
  for before, after in ((film_a, film_b), (film_b, film_a)):
    switched = [before[: scene.moment], after[scene.moment :]]
    films += [before, np.concatenate(switched)]
  return films


def _draw(
  property_name: str, screen: bool, rng: np.random.Generator
) -> tuple[_Scene, _State, _State]:
  """Draws a scene and two states that differ in one property."""
  radius = rng.uniform(*_RADIUS)
  speed = rng.uniform(*_SPEED)
  middle = SIZE / 2 + rng.uniform(-3, 3)
  # At the moment it hides the object whole, for some frames.
  half = radius + speed / 2 + 2.5
  coarse = rng.uniform(-1, 1, (6, 6)).astype(np.float32)
  texture = cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
  tone = rng.uniform(60, 130) * rng.uniform(0.85, 1.15, 3)
  background = np.clip(tone + 15 * texture[..., None], 0, 255)
  scene = _Scene(
    background=background,
    screen=(middle - half, middle + half) if screen else None,
    screen_colour=rng.uniform(150, 230) * rng.uniform(0.85, 1, 3),
    radius=radius,
    slant=rng.uniform(-_SLANT, _SLANT),
    middle=middle,
    moment=int(rng.integers(*_MOMENT)),
  )
  shapes = rng.permutation(len(SHAPES))
  hues = rng.permutation(len(_HUES))
  # Two rows that do not overlap.
  rows = SIZE / 2 + rng.uniform(-2, 2) + np.array([-1, 1]) * rng.uniform(7, 10)
  rows = rng.permutation(rows)
  speed *= rng.choice((-1, 1))
  a = _State(True, int(shapes[0]), int(hues[0]), float(rows[0]), float(speed))
  change = {
    'permanence': {'present': False},
    'shape': {'shape': int(shapes[1])},
    'colour': {'hue': int(hues[1])},
    'position': {'row': float(rows[1])},
    'direction': {'speed': -float(speed)},
  }[property_name]
  b = a._replace(**change)
  return (scene, a, b) if rng.random() < 0.5 else (scene, b, a)


def _bounce(path: np.ndarray, radius: float) -> np.ndarray:
  """Folds a straight path `[T]` back into the box."""
  low, high = _WALL + radius, SIZE - _WALL - radius
  phase = np.mod(path - low, 2 * (high - low))
  return low + np.minimum(phase, 2 * (high - low) - phase)


def _render(scene: _Scene, state: _State) -> np.ndarray:
  """Renders a film of one state, uint8 `[FRAMES, SIZE, SIZE, 3]`."""
  pixels = np.arange(SIZE, dtype=np.float32) + 0.5
  film = np.repeat(scene.background[None], FRAMES, axis=0)
  if state.present:
    # The moment is half a frame before the first frame of the second state.
    times = np.arange(FRAMES) - scene.moment + 0.5
    path_x = _bounce(scene.middle + state.speed * times, scene.radius)
    path_y = _bounce(state.row + scene.slant * times, scene.radius)
    x = (pixels - path_x[:, None])[:, None, :] / scene.radius
    y = (pixels - path_y[:, None])[:, :, None] / scene.radius
    # Lit from above on the left.
    light = np.clip(0.8 - 0.3 * (x + y), 0.4, 1.2)[..., None]
    alpha = np.clip(0.5 - scene.radius * _distance(state.shape, x, y), 0, 1)
    colour = np.clip(_HUES[state.hue] * light, 0, 255)
    film += alpha[..., None] * (colour - film)
  if scene.screen:
    left, right = scene.screen
    cover = np.clip(np.minimum(pixels - left, right - pixels) + 0.5, 0, 1)
    stripes = 1 - 0.15 * (np.arange(SIZE) // 3 % 2)
    colour = scene.screen_colour * stripes[:, None, None]
    film += cover[:, None] * (colour - film)
  return np.round(film).astype(np.uint8)


def _distance(shape: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Signed distance to the edge, in radii, `[T, SIZE, SIZE]`."""
  if SHAPES[shape] == 'disc':
    return np.hypot(x, y) - 0.95
  if SHAPES[shape] == 'square':
    return np.maximum(np.abs(x), np.abs(y)) - 0.82
  sides = np.maximum(0.866 * np.abs(x) - 0.5 * y, y + 0 * x)
  return sides - 0.62
