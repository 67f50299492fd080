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
import sys
from typing import Any

from absl import app, flags, logging
from etils import epath
import jax
import numpy as np
import optax

from vjepa_jax import mistakes
from vjepa_jax.data import sources
from vjepa_jax.data.decode import DecodeError
from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.plots import surprise as surprise_pictures
from vjepa_jax.progress import make_bar
from vjepa_jax.sets import pairs
from vjepa_jax.training.state import init_state
from vjepa_jax.world import surprise, surprise_scores
from vjepa_jax.world.model import WorldModel

_INPUT = flags.DEFINE_string(
  'input', 'data/physics', 'Folder of a physics set, with its test.csv.'
)
_VIDEO = flags.DEFINE_string('video', None, 'A film to draw, instead of a set.')
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Folder to write; WORKDIR/surprise by default.'
)
_WINDOW = flags.DEFINE_integer(
  'window', None, 'Frames of a window; as in training by default.'
)
_CONTEXT = flags.DEFINE_integer(
  'context_frames', None, 'Frames of it that are seen; half by default.'
)
_STRIDE = flags.DEFINE_integer('stride', 2, 'Frames between windows.')
_STEP = flags.DEFINE_integer(
  'frame_step', None, 'Frames of the film a frame of a window; as in training.'
)
_REFERENCE = flags.DEFINE_string(
  'reference',
  None,
  "Possible films that targets normalised by 'position' are compared with: a "
  'folder or manifest. The train.csv of --input, or what the run trained on.',
)
_NUM_REFERENCE = flags.DEFINE_integer(
  'num_reference', 100, 'At most so many of them.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the untrained model.')


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
  config: dict[str, Any], resolution: int, step: int, frames: int
) -> list[np.ndarray]:
  """Reads the possible films of --reference or of its default."""
  path = _REFERENCE.value
  if path is None and _VIDEO.value is None:
    path = str(epath.Path(_INPUT.value) / 'train.csv')
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
  chosen = sorted(order[: _NUM_REFERENCE.value])
  films = read_films(
    [source[int(i)].video for i in chosen], resolution, step, frames
  )
  return list(films.values())


def measure_set(
  model: WorldModel,
  windows: surprise.Windows,
  films: dict[str, np.ndarray],
  reference: list[np.ndarray],
) -> dict[str, dict[str, np.ndarray]]:
  """Measures the surprise of films, by model and file."""
  untrained = make_untrained(model, _SEED.value)
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


def run_set(model, windows, folder, found, *, config, resolution, step) -> None:
  """Scores a physics set and draws some of its pairs."""
  paths = [path for p in found for path in (p.possible, p.impossible)]
  films = read_films(paths, resolution, step, windows.frames)
  found = [p for p in found if p.possible in films and p.impossible in films]
  if not found:
    raise ValueError(f'{_INPUT.value} has no pair of which both films are good')
  reference = []
  if model.norm == 'position':
    reference = read_reference(config, resolution, step, windows.frames)
  curves = measure_set(model, windows, films, reference)
  results = {
    name: surprise_scores.score_set(found, curves[name])
    for name in surprise_scores.MODELS
  }
  print(surprise_scores.format_table(results))
  settings = {
    'input': _INPUT.value,
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
  model, windows, folder, unused, *, config, resolution, step
) -> None:
  """Draws the surprise of one film over time."""
  try:
    film = pairs.read_film(_VIDEO.value, resolution, step)
  except DecodeError as error:
    raise ValueError(f'{_VIDEO.value}: {error}') from None
  windows.place(len(film))
  reference = []
  if model.norm == 'position':
    reference = read_reference(config, resolution, step, windows.frames)
  curve = surprise.make_measure(model, windows, reference)([film])[0]
  centre = windows.centre(len(film))
  peak = step * centre[curve.argmax()]
  print(
    f'{len(curve)} windows, surprise {curve.mean():.4f} on average, '
    f'{curve.max():.4f} at most, in what is around frame {peak:.0f}'
  )
  text = {
    'video': _VIDEO.value,
    'frame': (step * centre).tolist(),
    'surprise': curve.tolist(),
  }
  (folder / 'results.json').write_text(json.dumps(text, indent=2) + '\n')
  print(f'results: {folder / "results.json"}')
  name = epath.Path(_VIDEO.value).name
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


def main(argv: list[str]) -> None:
  """Scores a set, or draws a film."""
  if len(argv) != 2:
    raise ValueError('give one workdir: surprise WORKDIR --input=data/physics')
  # Orbax tells its life at the level of information.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= logging.logging.WARNING
      or 'vjepa_jax' in record.pathname
    )
  )
  source = argv[1]
  if epath.Path(source).is_file() and not _OUTPUT.value:
    raise ValueError(f'{source} is a file: say where to write with --output')
  # What is quickly found to be wrong is, before weights are read.
  found = None if _VIDEO.value else pairs.read_pairs(_INPUT.value)
  config = read_config(source)
  model = load_world_model(source)
  if model.resolution is None:
    raise WeightsError(
      f'{source} does not say what resolution it is for: convert it with '
      'python -m vjepa_jax.tools.convert --resolution=...'
    )
  frames = _WINDOW.value or model.frames or 16
  windows = surprise.Windows(
    frames, _CONTEXT.value or frames // 2, _STRIDE.value
  )
  windows.check(model.tubelet)
  step = _STEP.value or config.get('clip', {}).get('frame_step') or 1
  folder = epath.Path(_OUTPUT.value or epath.Path(source) / 'surprise')
  folder.mkdir(parents=True, exist_ok=True)
  run = run_video if _VIDEO.value else run_set
  run(
    model,
    windows,
    folder,
    found,
    config=config,
    resolution=model.resolution,
    step=step,
  )


if __name__ == '__main__':
  try:
    app.run(main, flags_parser=mistakes.parse_flags)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(mistakes.explain(error))
