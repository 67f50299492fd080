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
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np
import optax

from vjepa_jax.data import sources
from vjepa_jax.data.decode import DecodeError
from vjepa_jax.errors import UserError
from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.plots import surprise as surprise_pictures
from vjepa_jax.progress import make_bar
from vjepa_jax.sets import pairs
from vjepa_jax.tools import command
from vjepa_jax.training.state import init_state
from vjepa_jax.world import surprise, surprise_scores
from vjepa_jax.world.model import WorldModel


def make_untrained(model: WorldModel, seed: int) -> WorldModel:
  """Returns the same model with the parameters of step 0."""
  state = jax.jit(init_state, static_argnums=(1, 2, 3, 4))(
    jax.random.key(seed),
    model.encoder,
    model.predictor,
    optax.identity(),
    (2, 1, 1),
  )
  params = state.params | {'target': state.target}
  if model.targets == 'frozen':
    params['target'] = model.params['target']
  return model._replace(params=params)


def read_films(
  paths: Sequence[str], resolution: int, step: int, frames: int
) -> dict[str, np.ndarray]:
  """Reads films by path; leaves out, and names, those that cannot be used."""
  films, failed = {}, 0
  bar = make_bar(paths, desc='reading films', unit='film', leave=False)
  for path in bar:
    try:
      film = pairs.read_film(path, resolution, step)
      if len(film) < frames:
        raise DecodeError(
          f'{len(film)} frames at step {step}, the window has {frames}'
        )
      films[path] = film
    except DecodeError as error:
      failed += 1
      logging.warning('left out %s: %s', path, error)
  if failed:
    print(f'{failed} of {len(paths)} films were left out, see the warnings')
  if not films:
    raise ValueError(
      f'none of {len(paths)} films could be used, the first is {paths[0]}'
    )
  return films


def read_reference(
  options: SimpleNamespace,
  config: dict[str, Any],
  resolution: int,
  step: int,
  frames: int,
) -> list[np.ndarray]:
  """Reads the possible films of --reference or of its default."""
  path = options.reference
  if path is None and options.video is None:
    path = str(epath.Path(options.input) / 'train.csv')
  if path is None:
    path = next(iter(config['data']['sources'].values()))['path']
  try:
    source = sources.open_source(path)
  except FileNotFoundError as error:
    raise ValueError(
      f'{error}; the run normalised its targets over clips, so give possible '
      'films as --reference'
    ) from None
  order = np.random.default_rng(0).permutation(len(source))
  chosen = sorted(order[: options.num_reference])
  films = read_films(
    [source[int(i)].video for i in chosen], resolution, step, frames
  )
  return list(films.values())


def measure_set(
  seed: int,
  model: WorldModel,
  windows: surprise.Windows,
  films: dict[str, np.ndarray],
  reference: list[np.ndarray],
) -> dict[str, dict[str, np.ndarray]]:
  """Measures the surprise of films, by model and file."""
  untrained = make_untrained(model, seed)
  clips = list(films.values())
  curves = {
    'pretrained': surprise.make_measure(model, windows, reference)(clips),
    'random_init': surprise.make_measure(untrained, windows, reference)(clips),
    'pixels': surprise.measure_pixels(clips, windows),
  }
  return {
    name: dict(zip(films, values, strict=True))
    for name, values in curves.items()
  }


def run_set(
  options, model, windows, folder, found, *, config, resolution, step
) -> None:
  """Scores a physics set and draws some of its pairs."""
  paths = [path for p in found for path in (p.possible, p.impossible)]
  films = read_films(paths, resolution, step, windows.frames)
  found = [p for p in found if p.possible in films and p.impossible in films]
  if not found:
    raise ValueError(
      f'{options.input} has no pair of which both films are good'
    )
  reference = []
  if model.norm == 'position':
    reference = read_reference(
      options, config, resolution, step, windows.frames
    )
  curves = measure_set(options.seed, model, windows, films, reference)
  results = {
    name: surprise_scores.score_set(found, curves[name])
    for name in surprise_scores.MODELS
  }
  print(surprise_scores.format_table(results))
  settings = {
    'input': options.input,
    'window': windows.frames,
    'context_frames': windows.context_frames,
    'stride': windows.stride,
    'frame_step': step,
    'target_norm': model.norm,
    'left_out': len(set(paths)) - len(films),
  }
  path = folder / 'results.json'
  path.write_text(json.dumps(settings | results, indent=2) + '\n')
  print(f'results: {path}')

  # The first pair of each property, behind a screen where there is one.
  shown = {}
  for pair in sorted(found, key=lambda p: not p.screen):
    shown.setdefault(pair.property, pair)
  panels = [
    surprise_pictures.Panel(
      pair.property,
      {
        name: (films[file], curves['pretrained'][file])
        for name, file in (
          ('possible', pair.possible),
          ('impossible', pair.impossible),
        )
      },
      None if pair.frame is None else pair.frame / step,
    )
    for pair in shown.values()
  ]
  _draw(folder, panels, windows)


def run_video(
  options, model, windows, folder, unused, *, config, resolution, step
) -> None:
  """Draws the surprise of one film over time."""
  try:
    film = pairs.read_film(options.video, resolution, step)
  except DecodeError as error:
    raise ValueError(f'{options.video}: {error}') from None
  windows.place(len(film))
  reference = []
  if model.norm == 'position':
    reference = read_reference(
      options, config, resolution, step, windows.frames
    )
  curve = surprise.make_measure(model, windows, reference)([film])[0]
  centre = windows.centre(len(film))
  peak = step * centre[curve.argmax()]
  print(
    f'{len(curve)} windows, surprise {curve.mean():.4f} on average, '
    f'{curve.max():.4f} at most, in what is around frame {peak:.0f}'
  )
  text = {
    'video': options.video,
    'frame': (step * centre).tolist(),
    'surprise': curve.tolist(),
  }
  (folder / 'results.json').write_text(json.dumps(text, indent=2) + '\n')
  print(f'results: {folder / "results.json"}')
  name = epath.Path(options.video).name
  _draw(
    folder,
    [surprise_pictures.Panel(name, {'film': (film, curve)}, None)],
    windows,
  )


def _draw(folder, panels, windows):
  surprise_pictures.draw_surprise(
    folder / 'surprise.png', panels, windows.centre
  )
  print(f'picture: {folder / "surprise.png"}')


def read_config(source: str) -> dict[str, Any]:
  """Reads the config of a run, {} of weights from elsewhere."""
  path = epath.Path(source) / 'config.json'
  return json.loads(path.read_text()) if path.exists() else {}


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string(
    'input', 'data/physics', 'Folder of a physics set, with its test.csv.'
  )
  define.string('video', None, 'A film to draw, instead of a set.')
  define.string('output', None, 'Folder to write; WORKDIR/surprise by default.')
  define.integer(
    'window', None, 'Frames of a window; as in training by default.'
  )
  define.integer(
    'context_frames', None, 'Frames of it that are seen; half by default.'
  )
  define.integer('stride', 2, 'Frames between windows.')
  define.integer(
    'frame_step',
    None,
    'Frames of the film a frame of a window; as trained.',
  )
  define.string(
    'reference',
    None,
    "Possible films that targets normalised by 'position' are compared with: a "
    'folder or manifest. The train.csv of --input, or what the run trained on.',
  )
  define.integer('num_reference', 100, 'At most so many of them.')
  define.integer('seed', 0, 'Of the untrained model.')


def main(options: SimpleNamespace, workdir: str) -> None:
  """Scores a set, or draws a film."""
  if epath.Path(workdir).is_file() and not options.output:
    raise UserError(f'{workdir} is a file: say where to write with --output')
  # What is quickly found to be wrong is, before weights are read.
  found = None if options.video else pairs.read_pairs(options.input)
  config = read_config(workdir)
  model = load_world_model(workdir)
  if model.resolution is None:
    raise WeightsError(
      f'{workdir} does not say what resolution it is for: convert it with '
      'python -m vjepa_jax.tools.convert --resolution=...'
    )
  frames = options.window or model.frames or 16
  windows = surprise.Windows(
    frames, options.context_frames or frames // 2, options.stride
  )
  windows.check(model.tubelet)
  step = options.frame_step or config.get('clip', {}).get('frame_step') or 1
  folder = epath.Path(options.output or epath.Path(workdir) / 'surprise')
  folder.mkdir(parents=True, exist_ok=True)
  run = run_video if options.video else run_set
  run(
    options,
    model,
    windows,
    folder,
    found,
    config=config,
    resolution=model.resolution,
    step=step,
  )


if __name__ == '__main__':
  command.run(main, define_flags)
