"""What a run is: its configuration, model and data, and clips as it sees them.

All of it comes from `config.json` and the checkpoints; a run that has neither,
or whose videos are elsewhere, is described by less.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
import cv2
from etils import epath
import jax
from ml_collections import config_dict
import numpy as np

from vjepa_jax.interop.load import load, make_abstract
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.plots.training import paint_mask, project_features
from vjepa_jax.progress import make_bar
from vjepa_jax.tasks.pretrain import make_loader
from vjepa_jax.tasks.program import build_models, get_grid
from vjepa_jax.tasks.teacher import read_teacher
from vjepa_jax.tools.report.folders import Picture, embed, format_value

_SHOWN_CLIPS = 2
# Clips whose features the components are of.
_ENCODED_CLIPS = 4
_MAX_FRAMES = 8
_TILE = 112  # pixels of a frame in a strip, about
_GAP = 2
# Attention on a CPU writes out the scores of all pairs of tokens.
_MAX_TOKENS = 4096
# What another version of the program or another machine may lack.
_MISSING = (
  AttributeError,
  ImportError,
  KeyError,
  OSError,
  RuntimeError,
  TypeError,
  ValueError,
)


def make_config(values: Mapping[str, Any]) -> config_dict.ConfigDict:
  """Makes the config of a run again from its `config.json`."""

  def freeze(value):
    if isinstance(value, dict):
      return {k: freeze(v) for k, v in value.items()}
    # A model's fields have to be hashable.
    return tuple(map(freeze, value)) if isinstance(value, list) else value

  return config_dict.ConfigDict(freeze(values))


def flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Flattens a nested config to dotted names."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def find_departures(
  values: Mapping[str, Any],
) -> list[tuple[str, Any, Any]] | None:
  """Finds what a config has otherwise than `configs/base.py`.

  Args:
    values: Config of a pretraining run, nested.

  Returns:
    Name, value, and value of the base, or None if it has no such field; None
    if the base is not at hand, or the config is not made from it.
  """
  try:
    # Recipes are files of the repository, not of the package.
    from configs import base  # noqa: PLC0415
  except ImportError:
    return None
  defaults, flat = flatten(base.get_config().to_dict()), flatten(values)
  # Sections that a recipe fills are empty in the base.
  if not {name.partition('.')[0] for name in defaults} <= set(values):
    return None
  return [
    (name, value, defaults.get(name))
    for name, value in flat.items()
    if name not in defaults or defaults[name] != value
  ]


def describe_model(config: config_dict.ConfigDict) -> str:
  """Describes encoder, predictor, clips and masks in a few sentences."""
  mesh = mesh_lib.make_mesh()
  teacher = read_teacher(config.teacher, config.encoder.tubelet)
  encoder, predictor = build_models(config, mesh, teacher)
  counts = [
    sum(x.size for x in jax.tree.leaves(tree)) / 1e6
    for tree in (
      make_abstract(encoder),
      make_abstract(predictor, encoder.width),
    )
  ]
  grid, clip = get_grid(config), config.clip
  masks = [
    f'Mask {name} ({spec.kind}) shows {spec.context_tokens} of them and asks '
    f'for {spec.target_tokens}.'
    for name, spec in ((n, config.masks[n]) for n in config.mask_names)
  ]
  return (
    f'An encoder of size {config.encoder.size} with {counts[0]:.3g} M '
    f'parameters (width {encoder.width}, depth {encoder.depth}) and a '
    f'predictor with {counts[1]:.2g} M (width {predictor.width}, depth '
    f'{predictor.depth}). Clips of {clip.frames} frames of {clip.resolution} × '
    f'{clip.resolution} pixels make {grid[0]} × {grid[1]} × {grid[2]} = '
    f'{int(np.prod(grid))} tokens. {" ".join(masks)}'
  )


def describe_data(config: config_dict.ConfigDict) -> str:
  """Names the sources, with their weights if there are several."""
  sources = config.data.sources
  total = sum(source.weight for source in sources.values())
  named = [
    f'{name} ({source.path})'
    + (f', {source.weight / total:.0%}' if len(sources) > 1 else '')
    for name, source in sources.items()
  ]
  return f'Videos: {"; ".join(named)}.'


def describe_progress(
  config: config_dict.ConfigDict | None, metrics: Sequence[Mapping[str, Any]]
) -> str:
  """Says how far a run has come, and in what time."""
  step = int(metrics[-1]['step'])
  total = config.get('total_steps') if config else None
  done = f'Step {step}' + (f' of {total}' if total else '')
  seconds, last = 0.0, 0
  for line in metrics:
    if 'seconds_per_step' in line:
      seconds += line['seconds_per_step'] * (line['step'] - last)
      last = line['step']
  clips = config.data.batch_size * step if config else 0
  if clips:
    done += f', {format_value(clips)} clips'
  if not seconds:
    return f'{done}.'
  rate = f' ({clips / seconds:.3g} clips/s)' if clips else ''
  return (
    f'{done}, in {_format_seconds(seconds)} of training{rate}, compilation '
    'included, evaluation and saving left out.'
  )


def _format_seconds(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.0f} s'
  if seconds < 2 * 3600:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'


def try_to(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function; None, and a line in the log, where it is not possible."""
  try:
    return function(*arguments)
  except _MISSING as error:
    text = ' '.join(str(error).split())
    logging.info('left out %s: %s: %s', what, type(error).__name__, text)
    return None


def load_clips(
  config: config_dict.ConfigDict,
) -> list[dict[str, Any]]:
  """Loads clips with their masks, as training does: cropped at random.

  Returns:
    Samples, see `pipeline.SampleLoader`.

  Raises:
    OSError: The videos are not here; other errors likewise.
  """
  loader = make_loader(config)
  length = len(loader.sources[0])
  order = np.random.default_rng(config.seed).permutation(length)
  return [
    loader(position, (0, int(index)))
    for position, index in enumerate(order[:_ENCODED_CLIPS])
  ]


def draw_masks(
  config: config_dict.ConfigDict, samples: Sequence[dict[str, Any]]
) -> list[list[Picture]]:
  """Draws the masks of the first clips over their frames.

  Returns:
    For each clip its frames side by side, as they are and under each mask.
  """
  grid, clips = get_grid(config), []
  for sample in samples[:_SHOWN_CLIPS]:
    video = sample['video']['pixels'][0]
    strips = [_make_strip('clip', video / 255.0, config)]
    for name, mask in zip(
      config.mask_names, sample['video']['masks'], strict=True
    ):
      painted = paint_mask(video, mask['context'][0], mask['target'][0], grid)
      strips.append(_make_strip(f'mask {name}', painted, config))
    clips.append(strips)
  return clips


def draw_features(
  workdir: epath.Path,
  config: config_dict.ConfigDict,
  samples: Sequence[dict[str, Any]],
) -> list[list[Picture]]:
  """Draws three principal components of features as colours.

  Those of the newest checkpoint's target encoder, and of the weights that the
  run started from.

  Returns:
    For each of the first clips its frames, and its features by encoder.

  Raises:
    ValueError: There is no checkpoint, or clips are too long for a CPU.
  """
  grid = get_grid(config)
  if np.prod(grid) > _MAX_TOKENS:
    raise ValueError(f'{np.prod(grid)} tokens are many for a CPU')
  loaded = load(workdir, resize=False)
  videos = np.concatenate([sample['video']['pixels'][:1] for sample in samples])
  key = jax.random.split(jax.random.key(config.seed))[0]
  untrained = jax.jit(loaded.encoder.init)(key, videos[:1])['params']
  apply = jax.jit(lambda p, v: loaded.encoder.apply({'params': p}, v))
  encoders = {'before training': untrained, 'trained': loaded.params}
  painted = {}
  with make_bar(
    total=len(encoders) * len(videos), desc='features', leave=False
  ) as bar:
    for name, params in encoders.items():
      features = []
      for video in videos:
        features.append(np.asarray(apply(params, video[None])))
        bar.update()
      painted[name] = project_features(np.concatenate(features), grid)
  return [
    [_make_strip('clip', video / 255.0, config)]
    + [
      _make_strip(name, colours[i], config) for name, colours in painted.items()
    ]
    for i, video in enumerate(videos[:_SHOWN_CLIPS])
  ]


def _make_strip(
  label: str, frames: np.ndarray, config: config_dict.ConfigDict
) -> Picture:
  """Puts frames `[n, h, w, 3]`, 0..1, side by side, one a step in time.

  They may be of pixels or of tokens and become as large as each other.
  """
  steps, resolution = get_grid(config)[0], config.clip.resolution
  shown = np.linspace(0, steps - 1, min(steps, _MAX_FRAMES)).round()
  # Whole multiples keep pixels square.
  side = min(resolution, _TILE) * max(1, round(_TILE / resolution))
  row = []
  for frame in frames[(shown * len(frames) / steps).astype(int)]:
    shrinks = side < len(frame)
    tile = cv2.resize(
      np.clip(255 * frame, 0, 255).astype(np.uint8),
      (side, side),
      interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST,
    )
    tile = cv2.cvtColor(tile, cv2.COLOR_RGB2BGRA)
    # Transparent: the page may be light or dark.
    row += [tile, np.zeros((side, _GAP, 4), np.uint8)]
  _, content = cv2.imencode('.png', np.concatenate(row[:-1], axis=1))
  return embed(content.tobytes(), '.png', label)
