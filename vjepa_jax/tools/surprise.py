"""Measures surprise: do impossible films surprise a model more?

python -m vjepa_jax.tools.surprise runs/physics --input=data/physics
python -m vjepa_jax.tools.surprise runs/physics --video=film.mp4

The first prints the share of pairs in which the impossible film surprises more,
beside an untrained model of the same architecture and beside pixels that are
expected to stay, and writes results.json and surprise.png to WORKDIR/surprise.
The second draws the surprise of a film of one's own over time. WORKDIR may be
anything that has a predictor: a workdir, a Hugging Face folder, an official
file (then with --output).
"""

from collections.abc import Sequence
import json
from types import SimpleNamespace

from absl import logging
from etils import epath
import numpy as np

from vjepa_jax.data import sources
from vjepa_jax.data.decode import DecodeError
from vjepa_jax.errors import UserError
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.plots.surprise import Panel, draw_surprise
from vjepa_jax.progress import make_bar
from vjepa_jax.sets.pairs import Pair, read_film, read_pairs
from vjepa_jax.tools import command
from vjepa_jax.world.baselines import make_untrained
from vjepa_jax.world.model import WorldModel
from vjepa_jax.world.surprise import Windows, measure_pixels, measure_surprise
from vjepa_jax.world.surprise_scores import MODELS, format_table, score_set


class Session:
  """One model and its windows over films."""

  def __init__(self, options: SimpleNamespace, world: WorldModel):
    """Takes the flags; what they leave open, the model says."""
    frames = options.window or world.frames or 16
    context_frames = options.context_frames or frames // 2
    self.options, self.world = options, world
    self.windows = Windows(frames, context_frames, options.stride)
    self.windows.check(world.tubelet)
    trained = world.clip and world.clip.frame_step
    self.frame_step = options.frame_step or trained or 1

  def read_films(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads films by path; leaves out, and names, those that are of no use."""
    films = {}
    bar = make_bar(paths, desc='reading films', unit='film', leave=False)
    for path in bar:
      try:
        film = read_film(path, self.world.resolution, self.frame_step)
        self.windows.place(len(film))
        films[path] = film
      except (DecodeError, ValueError) as error:
        logging.warning('left out %s: %s', path, error)
    failed = len(set(paths)) - len(films)
    if failed:
      print(f'{failed} of {len(paths)} films were left out, see the warnings')
    if not films:
      raise UserError(
        f'none of {len(paths)} films could be used, the first is {paths[0]}'
      )
    return films

  def read_reference(self) -> list[np.ndarray]:
    """Reads possible films where targets are normalised over clips, else none.

    They are those of --reference or of its default.
    """
    world, options = self.world, self.options
    if world.norm != 'position':
      return []
    path = options.reference or (
      world.sources[0]['path']
      if options.video
      else f'{options.input}/train.csv'
    )
    try:
      source = sources.open_source(path)
    except FileNotFoundError as error:
      raise UserError(
        f'{error}; the run normalised its targets over clips, so give possible '
        'films as --reference'
      ) from None
    order = np.random.default_rng(0).permutation(len(source))
    indices = sorted(order[: options.num_reference])
    films = self.read_films([source[int(i)].video for i in indices])
    return list(films.values())

  def score_films(self, pairs: Sequence[Pair]) -> tuple[dict, list[Panel]]:
    """Scores a physics set; returns numbers and some of its pairs to draw."""
    world, windows = self.world, self.windows
    paths = [path for p in pairs for path in (p.possible, p.impossible)]
    films = self.read_films(paths)
    pairs = [p for p in pairs if p.possible in films and p.impossible in films]
    if not pairs:
      raise UserError(
        f'{self.options.input} has no pair of which both films are good'
      )
    clips = list(films.values())
    reference = self.read_reference()
    untrained = make_untrained(world, self.options.seed)
    curves = {
      'pretrained': measure_surprise(world, windows, clips, reference),
      'random_init': measure_surprise(untrained, windows, clips, reference),
      'pixels': measure_pixels(clips, windows),
    }
    curves = {k: dict(zip(films, x, strict=True)) for k, x in curves.items()}
    scores = {name: score_set(pairs, curves[name]) for name in MODELS}
    print(format_table(scores))
    results = {
      'input': self.options.input,
      'window': windows.frames,
      'context_frames': windows.context_frames,
      'stride': windows.stride,
      'frame_step': self.frame_step,
      'target_norm': world.norm,
      'left_out': len(set(paths)) - len(films),
      **scores,
    }
    # The first pair of each property, behind a screen where there is one.
    shown = {}
    for pair in sorted(pairs, key=lambda p: not p.screen):
      shown.setdefault(pair.property, pair)
    panels = []
    for pair in shown.values():
      both = {'possible': pair.possible, 'impossible': pair.impossible}
      drawn = {k: (films[p], curves['pretrained'][p]) for k, p in both.items()}
      frame = None if pair.frame is None else pair.frame / self.frame_step
      panels.append(Panel(pair.property, drawn, frame))
    return results, panels

  def follow_film(self) -> tuple[dict, list[Panel]]:
    """Measures one film; returns numbers and what to draw."""
    video = self.options.video
    try:
      film = read_film(video, self.world.resolution, self.frame_step)
    except DecodeError as error:
      raise UserError(f'{video}: {error}') from None
    centre = self.frame_step * self.windows.centre(len(film))
    curve = measure_surprise(
      self.world, self.windows, [film], self.read_reference()
    )[0]
    print(
      f'{len(curve)} windows, surprise {curve.mean():.4f} on average, '
      f'{curve.max():.4f} at most, in what is around frame '
      f'{centre[curve.argmax()]:.0f}'
    )
    results = {'frame': centre.tolist(), 'surprise': curve.tolist()}
    panel = Panel(epath.Path(video).name, {'film': (film, curve)}, None)
    return {'video': video, **results}, [panel]


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('input', 'Folder of a physics set.', 'data/physics')
  define.string('video', 'A film to draw, instead of a set.')
  define.string('output', 'Folder to write; WORKDIR/surprise by default.')
  define.integer('window', 'Frames of a window; as in training by default.')
  define.integer('context_frames', 'Frames of it that are seen; half if none.')
  define.integer('stride', 'Frames between windows.', 2)
  define.integer('frame_step', 'Film frames a window frame; as trained.')
  define.string(
    'reference',
    "Possible films that targets normalised by 'position' are compared with: a "
    'folder or manifest. The train.csv of --input, or what the run trained on.',
  )
  define.integer('num_reference', 'At most so many of them.', 100)
  define.integer('seed', 'Of the untrained model.', 0)


def main(options: SimpleNamespace, workdir: str) -> None:
  """Scores a set, or draws a film."""
  if epath.Path(workdir).is_file() and not options.output:
    raise UserError(f'{workdir} is a file: say where to write with --output')
  # What is quickly found to be wrong is, before weights are read.
  pairs = None if options.video else read_pairs(options.input)
  world = load_world_model(workdir)
  if world.resolution is None:
    raise UserError(
      f'{workdir} does not say what resolution it is for: convert it with '
      'python -m vjepa_jax.tools.convert --resolution=...'
    )
  session = Session(options, world)
  folder = epath.Path(options.output or epath.Path(workdir) / 'surprise')
  folder.mkdir(parents=True, exist_ok=True)
  if options.video:
    results, panels = session.follow_film()
  else:
    results, panels = session.score_films(pairs)
  path, picture = folder / 'results.json', folder / 'surprise.png'
  path.write_text(json.dumps(results, indent=2) + '\n')
  draw_surprise(picture, panels, session.windows.centre)
  print(f'results: {path}\npicture: {picture}')


if __name__ == '__main__':
  command.run(main, define_flags)
