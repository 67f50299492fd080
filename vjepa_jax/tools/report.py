"""Makes one page about a run: report.html, which needs no other file.

python -m vjepa_jax.tools.report runs/quickstart
python -m vjepa_jax.tools.report --output=/tmp/mine.html runs/mine

At the top it says whether the run is healthy; below come the model, the curves,
masks and features over frames, and the results and pictures that other tools
left in folders of the run. The run may be going on. Works on the CPU: an
accelerator that a run is using is left alone.
"""

from collections.abc import Mapping, Sequence
import datetime
import json
from types import SimpleNamespace
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
import jax
from ml_collections import ConfigDict
import numpy as np

from configs import base
from vjepa_jax.errors import UserError
from vjepa_jax.interop.load import load, make_abstract
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.plots import charts, report
from vjepa_jax.plots.training import CURVES, paint_mask, project_features
from vjepa_jax.progress import make_bar
from vjepa_jax.tasks.pretrain import make_loader
from vjepa_jax.tasks.program import build_objective, get_grid, list_streams
from vjepa_jax.tools import command
from vjepa_jax.tools import report_folders as folders
from vjepa_jax.tools.report_folders import try_to
from vjepa_jax.training import health
from vjepa_jax.training.telemetry import read_metrics

# Overviews of other tools whose content the page has itself.
_OVERVIEWS = ('health.png', 'report.png')
# Tasks whose metrics the health rules are made for.
_PRETRAINING = ('pretrain', 'quickstart')
_SHOWN_CLIPS = 2
# Clips whose features the components are of.
_ENCODED_CLIPS = 4
# Attention on a CPU writes out the scores of all pairs of tokens.
_MAX_TOKENS = 4096


def make_report(workdir: epath.Path, *, encode: bool = True) -> str:
  """Makes the report of a run; what is missing is left out.

  Args:
    workdir: Directory of a run, which may be going on.
    encode: Encode a few clips, for the picture of the features.

  Returns:
    HTML.

  Raises:
    UserError: The directory is not of a run.
  """
  values = folders.read_json(workdir / 'config.json')
  if not (isinstance(values, dict) and 'task' in values):
    values = None
  metrics = read_metrics(workdir)
  if not (values or metrics or (workdir / 'results.json').exists()):
    raise UserError(
      f'{workdir} is not the directory of a run: it holds no config.json, '
      'metrics.jsonl or results.json; give the --workdir of main.py'
    )
  pretraining = values is None or values['task'] in _PRETRAINING
  config = samples = features = masks = None
  if values and pretraining:
    config = ConfigDict(_freeze(values))
    config.attention = 'auto'  # that of the run may not be for a CPU
    samples = try_to('masks and features', _load_clips, config)
  if samples:
    masks = _draw_masks(config, samples, 'video')
    if 'image' in list_streams(config):
      images = try_to('masks of images', _load_clips, config, 'image')
      masks += _draw_masks(config, images or (), 'image')
  if samples and encode:
    features = try_to('features', _draw_features, workdir, config, samples)
  sentences = [
    config and try_to('the model', _describe_model, config),
    config and try_to('the data', _describe_data, config),
    metrics and try_to('progress', _describe_progress, config, metrics),
  ]
  made = datetime.datetime.now()
  written = metrics and (workdir / 'metrics.jsonl').stat().mtime
  others = charts.group_rest(metrics, CURVES)
  without = _OVERVIEWS if features else _OVERVIEWS[:1]
  return report.render(
    {
      'name': workdir.name or workdir.absolute().name,
      'workdir': str(workdir),
      'written': written and _format_time(made.fromtimestamp(written)),
      'made': _format_time(made),
      'health': _judge(metrics) if metrics and pretraining else None,
      'waiting': config is not None and not metrics,
      'sentences': list(filter(None, sentences)),
      'charts': list(charts.draw_charts(metrics)),
      'other_charts': list(charts.draw_charts(metrics, others)),
      'masks': masks,
      'features': features,
      'results': folders.read_section(workdir, 'Results', without),
      'sections': list(folders.read_sections(workdir)),
      'quarantine': folders.read_quarantine(workdir),
      'departures': config and _find_departures(values),
      'config': json.dumps(values, indent=2) if values else None,
    }
  )


def _freeze(value: Any) -> Any:
  """Makes lists tuples again: a model's fields have to be hashable."""
  if isinstance(value, dict):
    return {k: _freeze(v) for k, v in value.items()}
  return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _find_departures(
  values: Mapping[str, Any],
) -> list[tuple[str, Any, Any]] | None:
  """Lists name, value and default of what departs from `configs/base.py`.

  None if the config is not made from it.
  """
  defaults = json.loads(json.dumps(base.get_config().to_dict(), default=str))
  if not set(defaults) <= set(values):
    return None
  defaults, values = (flatten_dict(x, sep='.') for x in (defaults, values))
  return [
    (name, value, defaults.get(name))
    for name, value in values.items()
    if name not in defaults or defaults[name] != value
  ]


def _judge(metrics: health.Metrics) -> dict[str, Any]:
  findings = health.find(metrics)
  # Early on, a rule that finds nothing has seen nothing.
  rules = () if findings[0].state == 'too early' else health.RULES
  passed = [r.__doc__.splitlines()[0] for r in rules if r(metrics) is None]
  verdict = health.judge(findings)
  return {'verdict': verdict, 'findings': findings, 'passed': passed}


def _describe_model(config: ConfigDict) -> str:
  """Describes encoder, predictor, clips and masks."""
  objective = build_objective(config, mesh_lib.make_mesh())
  encoder, predictor = objective.encoder, objective.predictor
  trees = make_abstract(encoder), make_abstract(predictor, encoder.width)
  counts = [sum(x.size for x in jax.tree.leaves(tree)) for tree in trees]
  text = (
    f'An encoder of size {config.encoder.size} with {counts[0] / 1e6:.3g} M '
    f'parameters (width {encoder.width}, depth {encoder.depth}) and a '
    f'predictor with {counts[1] / 1e6:.2g} M (width {predictor.width}, depth '
    f'{predictor.depth}).'
  )
  for name, stream in list_streams(config).items():
    grid, size = get_grid(config, name), stream.resolution
    frames = f' of {stream.frames} frames' * (stream.frames > 1)
    text += (
      f' {stream.noun.capitalize()}{frames} of {size} × {size} pixels make '
      f'{" × ".join(map(str, grid))} = {int(np.prod(grid))} tokens.'
    )
    for name in stream.mask_names:
      mask = config.masks[name]
      text += (
        f' Mask {name} ({mask.kind}) shows {mask.context_tokens} of them and '
        f'asks for {mask.target_tokens}.'
      )
  return text


def _describe_data(config: ConfigDict) -> str:
  """Names the sources, with their weights."""
  sentences = []
  for name, stream in list_streams(config).items():
    sources = config[stream.group].sources
    total = sum(source.weight for source in sources.values())
    named = [
      f'{k} ({s.path}), {s.weight / total:.0%}' for k, s in sources.items()
    ]
    sentences.append(f'{name.capitalize()}s: {"; ".join(named)}.')
  return ' '.join(sentences)


def _describe_progress(
  config: ConfigDict | None, metrics: Sequence[Mapping[str, Any]]
) -> str:
  """Says how far a run has come, and in what time."""
  step = int(metrics[-1]['step'])
  total = config.get('total_steps') if config else None
  done, rate = f'Step {step}' + f' of {total}' * bool(total), ''
  timed = [line for line in metrics if 'seconds_per_step' in line]
  steps = np.diff([line['step'] for line in timed], prepend=0)
  seconds = float(np.dot(steps, [line['seconds_per_step'] for line in timed]))
  if config:
    rates = []
    for stream in list_streams(config).values():
      count = stream.batch_size * step
      done += f', {report.format_value(count)} {stream.noun}'
      rates.append(f'{count / max(seconds, 1e-9):.3g} {stream.noun}/s')
    rate = f' ({", ".join(rates)})'
  if not seconds:
    return f'{done}.'
  shares = {
    name.removeprefix('share_'): share
    for name, share in timed[-1].items()
    if name.startswith('share_') and share >= 0.005
  }
  rest = [f'{kind} {share:.0%}' for kind, share in shares.items()]
  if rest:
    goodput = f'{timed[-1]["goodput"]:.0%}'
    rest = f' Of all time {goodput} was training; {", ".join(rest)}.'
  return (
    f'{done}, in {datetime.timedelta(seconds=round(seconds))} of training'
    f'{rate}.{rest or ""}'
  )


def _load_clips(
  config: ConfigDict, stream: str = 'video'
) -> list[dict[str, Any]]:
  """Loads clips with their masks, as training does: cropped at random."""
  loader = make_loader(config, stream)
  order = np.random.default_rng(config.seed).permutation(len(loader.sources[0]))
  return [
    loader(position, (0, int(index)))[stream]
    for position, index in enumerate(order[:_ENCODED_CLIPS])
  ]


def _make_strips(
  config: ConfigDict, rows: Mapping[str, np.ndarray], stream: str = 'video'
) -> list[report.Picture]:
  """Makes strips of clips and what was painted of them, by caption."""
  size = list_streams(config)[stream].resolution
  sizes = get_grid(config, stream)[0], size
  return [report.make_strip(name, x, *sizes) for name, x in rows.items()]


def _draw_masks(
  config: ConfigDict, samples: Sequence[dict[str, Any]], stream: str
) -> list[list[report.Picture]]:
  """Draws the first clips, each as it is and under each mask."""
  clips, shape = [], list_streams(config)[stream]
  for sample in samples[:_SHOWN_CLIPS]:
    video = sample['pixels'][0]
    rows = {shape.noun.removesuffix('s'): video / 255.0}
    for name, mask in zip(shape.mask_names, sample['masks'], strict=True):
      ids = mask['context'][0], mask['target'][0]
      rows[f'mask {name}'] = paint_mask(video, *ids, get_grid(config, stream))
    clips.append(_make_strips(config, rows, stream))
  return clips


def _draw_features(
  workdir: epath.Path,
  config: ConfigDict,
  samples: Sequence[dict[str, Any]],
) -> list[list[report.Picture]]:
  """Draws features of the first clips, before training and of the newest EMA.

  Three principal components of each encoder's features become colours.
  """
  grid = get_grid(config)
  if np.prod(grid) > _MAX_TOKENS:
    raise UserError(f'{np.prod(grid)} tokens are many for a CPU')
  loaded = load(workdir, resize=False)
  videos = np.concatenate([sample['pixels'][:1] for sample in samples])
  key = jax.random.split(jax.random.key(config.seed))[0]
  untrained = jax.jit(loaded.encoder.init)(key, videos[:1])['params']
  apply = jax.jit(lambda p, v: loaded.encoder.apply({'params': p}, v))
  models = {'before training': untrained, 'trained': loaded.params}
  painted = {'clip': videos / 255.0}
  for name, params in models.items():
    features = [
      np.asarray(apply(params, video[None]))
      for video in make_bar(videos, desc=f'features {name}', leave=False)
    ]
    painted[name] = project_features(np.concatenate(features), grid)
  return [
    _make_strips(config, {name: x[i] for name, x in painted.items()})
    for i in range(min(len(videos), _SHOWN_CLIPS))
  ]


def _format_time(time: datetime.datetime) -> str:
  return time.strftime('%Y-%m-%d %H:%M')


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('output', 'File to write; WORKDIR/report.html by default.')
  define.bool(
    'encode',
    'Encode a few clips, for the picture of the features: seconds for a small '
    'encoder, minutes for a large one.',
    True,
  )


def main(options: SimpleNamespace, workdir: str) -> None:
  """Makes the report of a run."""
  jax.config.update('jax_platforms', 'cpu')
  html = make_report(epath.Path(workdir), encode=options.encode)
  output = epath.Path(options.output or epath.Path(workdir) / 'report.html')
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(html)
  print(f'report: {output} ({len(html) / 2**20:.1f} MiB)')


if __name__ == '__main__':
  command.run(main, define_flags)
