"""Records the runs that the health rules are tested against.

PYTHONPATH=. python tests/training/record_runs.py --folder=data/motion

Pretrains on the motion set (written if missing), once as configs/small.py says
and once for every way to make it fail, and writes recorded/NAME.jsonl beside
this file: a line with the overrides, then metrics.jsonl. About a minute a run
on two CPU cores; --only=NAME,NAME records some.
"""

import json
import pathlib
import tempfile
import time

from absl import app, flags

from configs import small
from vjepa_jax.data import pipeline
from vjepa_jax.sets import motion, package_videos
from vjepa_jax.tasks.pretrain import pretrain
from vjepa_jax.training.telemetry import read_metrics

_FOLDER = flags.DEFINE_string('folder', 'data/motion', 'The motion set.')
_ONLY = flags.DEFINE_list('only', [], 'Names of runs; all by default.')

_PUBLISHED = {
  'objective.vjepa.target_norm': 'layer',
  'encoder.pixel_norm': 'imagenet',
  'encoder.init_std': 0.02,
}
RUNS = {
  # Good ones: the recipe, and targets normalised as published.
  'small': {},
  'layer_norm': {'objective.vjepa.target_norm': 'layer'},
  # The published choices at toy size; long-range tubes as well.
  'published': _PUBLISHED
  | {
    'masks.random': {
      'kind': 'multiblock',
      'num_blocks': 2,
      'spatial_scale': (0.35, 0.5),
      'context_tokens': 16,
      'target_tokens': 32,
    },
    'total_steps': 400,
  },
  'no_ema': _PUBLISHED | {'ema.value': 0.0, 'learning_rate.value': 5e-3},
  'collapsed': _PUBLISHED
  | {'ema.value': 0.0, 'learning_rate.value': 2e-2, 'total_steps': 120},
  'low_ema': {'ema.value': 0.5, 'learning_rate.value': 5e-3},
  'high_rate': {'learning_rate.value': 0.3, 'clip_norm': None},
  'diverged': {
    'learning_rate.value': 100.0,
    'clip_norm': None,
    'objective.vjepa.loss_exp': 2.0,
  },
  'low_rate': {'learning_rate.value': 1e-8, 'learning_rate.final': 1e-8},
  'starved': {'total_steps': 60},
}
_SECONDS_A_CLIP = 0.05  # of the starved run


def get_config(folder: pathlib.Path, overrides: dict):
  """Returns the recipe, shortened, with one run's overrides."""
  config = small.get_config()
  config.data.sources = dict(
    motion=dict(path=str(folder / 'train.csv'), weight=1.0)
  )
  config.data.batch_size = 32
  config.probe.every_steps = 0
  config.total_steps = 200
  config.checkpoint.every_steps = 10_000
  config.log_every_steps = 5
  config.diagnose_every_steps = 10
  with config.ignore_type():
    config.update_from_flattened_dict(overrides)
  return config


def record(name: str, folder: pathlib.Path, output: pathlib.Path) -> None:
  """Runs one run and writes what it logged."""
  read_clips = pipeline.read_clips

  def read_slowly(*arguments):
    time.sleep(_SECONDS_A_CLIP)
    return read_clips(*arguments)

  if name == 'starved':
    pipeline.read_clips = read_slowly
  with tempfile.TemporaryDirectory() as workdir:
    try:
      pretrain(get_config(folder, RUNS[name]), workdir)
    except FloatingPointError as error:
      print(f'{name}: {error}')
    finally:
      pipeline.read_clips = read_clips
    lines = [{'overrides': RUNS[name]}]
    for metrics in read_metrics(workdir):
      lines.append({k: float(f'{v:.4g}') for k, v in metrics.items()})
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (output / f'{name}.jsonl').write_text(text)


def main(_):
  folder = pathlib.Path(_FOLDER.value)
  if not (folder / 'motion.json').exists():
    videos = package_videos.fetch_package_videos(folder.parent / 'videos')
    motion.write_motion_set(folder, videos, num_train=6000)
  output = pathlib.Path(__file__).parent / 'recorded'
  for name in _ONLY.value or RUNS:
    record(name, folder, output)


if __name__ == '__main__':
  app.run(main)
