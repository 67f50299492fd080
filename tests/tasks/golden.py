"""Losses and parameters of every recipe after four steps of toy size.

Records what test_golden.py compares with golden.json, a process for a number of
devices:

  JAX_NUM_CPU_DEVICES=8 JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_PLATFORMS=cpu \
      python tests/tasks/golden.py FILE [NAME ...]
"""

import importlib
import json
import math
from pathlib import Path
import platform
import sys
import tempfile

from absl import flags
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from vjepa_jax.parallel import sharding
from vjepa_jax.sets.toy import write_toy_videos
from vjepa_jax.tasks import smoke

STEPS = 4


_PLAIN = (
  'vjepa1:l16',
  'vjepa1:h16_384',
  'vjepa2:variant=l16,stage=pretrain',
  'vjepa2:variant=l16,stage=cooldown_256',
  'vjepa2:variant=g16,stage=cooldown_384',
  'vjepa21:variant=l16,stage=pretrain',
  'vjepa21:variant=b16,stage=cooldown,numbers=release',
  'small:random',
  'small:future',
  'physics:',
  'finetune:folder',
  'finetune:k400',
  'finetune:ssv2_h16',
  'probe:folder,probe=v1',
  'probe:folder,probe=v2',
  'probe:folder,probe=linear',
  'probe:k400,probe=v2',
  'probe:diving48,probe=v2',
  'decoder:small',
  'decoder:large',
  'action:droid_release',
)
# Config arguments and what is changed in them.
RECIPES = {name: (name, {}) for name in _PLAIN} | {
  'vjepa1:l16+microbatches': ('vjepa1:l16', {'microbatches': 2}),
  'vjepa1:l16+variance': (
    'vjepa1:l16',
    {'objective.vjepa.variance_weight': 0.1},
  ),
  'vjepa1:l16+target_view': (
    'vjepa1:l16',
    {'objective.vjepa.target_view': 'targets'},
  ),
  'vjepa2:l16+bfloat16': ('vjepa2:l16', {'compute_dtype': 'bfloat16'}),
  'vjepa2:l16+context': (
    'vjepa2:l16',
    {
      'objective.kind': 'vjepa21',
      'objective.vjepa21.context_warmup_steps': (0, 0),
    },
  ),
  'vjepa21:l16,stage=distill_2+teacher': (
    'vjepa21:l16,stage=distill_2',
    {'objective.vjepa21.teacher': 'BACKBONE'},
  ),
  'small:random+regularizers': (
    'small:random',
    {
      'objective.kind': 'regularized',
      'objective.regularized.feature_variance_weight': 0.1,
      'objective.regularized.covariance_weight': 0.1,
      'objective.regularized.sigreg_weight': 0.1,
    },
  ),
  'small:random+pixels': ('small:random', {'objective.kind': 'salt'}),
}


def make_config(name, folder, workdir):
  """Builds the config of a recipe at toy size, beside what is in a folder."""
  argument, overrides = RECIPES[name]
  module, _, options = argument.partition(':')
  config = importlib.import_module(f'configs.{module}').get_config(
    options or None
  )
  for key, value in overrides.items():
    value = str(folder / 'backbone') if value == 'BACKBONE' else value
    config.update_from_flattened_dict({key: value})
  if module in ('probe', 'decoder'):
    shrink(config, module, folder)
  else:
    config = smoke.shrink(config, workdir)
    # No part of the training: one recipe shows that they run.
    if config.task == 'pretrain' and name != 'vjepa1:l16':
      config.diagnose_every_steps = 0
      config.probe.update(train='', test='')
    elif config.task == 'pretrain':
      config.probe.attentive_labels = 0
    config.compute_dtype = overrides.get('compute_dtype', 'float32')
  if jax.device_count() == 8:
    config.fsdp = 2
  return config


def shrink(config, module, folder):
  """Shrinks recipes on top of a backbone, which know no smoke."""
  config.backbone = str(folder / 'backbone')
  toy = str(folder / 'toy' / 'manifest.csv')
  config.compute_dtype = 'float32'
  config.total_steps = STEPS
  config.data.update(batch_size=8, num_workers=0)
  config.clip.update(frames=8, resolution=48, frame_step=2)
  config.checkpoint.every_steps = 2
  config.log_every_steps = 1
  if module == 'decoder':
    config.decoder.update(width=48, depth=1, num_heads=2)
    config.learning_rate.warmup_steps = 1
    config.statistics_clips = 8
    config.held_out.update(path=toy, every_steps=STEPS, max_clips=8)
    config.held_out.batch_size = 8
    return
  config.total_epochs = None
  config.num_classes = None
  config.data.update(train=toy, test=toy, validation=toy)
  config.segments = min(config.segments, 2)
  config.views = min(config.views, 2)
  config.evaluation.batch_size = 8
  config.validate_every_epochs = 100.0
  config.knn = 0


def run(config, workdir):
  """Runs the task of a config; returns losses and sums of parameters."""
  run_task(config, workdir)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  losses = [
    json.loads(line)['loss'] for line in lines if 'loss' in json.loads(line)
  ]
  with ocp.training.Checkpointer(workdir / 'checkpoints') as checkpoints:
    step = checkpoints.latest.step
    items = checkpoints.load_checkpointables(step, {'params': None})
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(items['params'])]
  return {
    'losses': losses,
    'params': math.fsum(float(x.sum()) for x in leaves),
    'absolute': math.fsum(float(np.abs(x).sum()) for x in leaves),
    'squares': math.fsum(float(np.square(x).sum()) for x in leaves),
  }


def run_task(config, workdir):
  """Runs the task of a config as the command does."""
  tasks = {
    'pretrain': 'pretrain',
    'quickstart': 'quickstart',
    'finetune': 'finetune',
    'probe': 'probe',
    'decoder': 'train_decoder',
    'action': 'train_action',
  }
  module = importlib.import_module(f'vjepa_jax.tasks.{config.task}')
  assert getattr(module, tasks[config.task])(config, workdir, None) is not None


def describe_machine() -> str:
  """Says what decides the last bit: compiler and processor."""
  cpu = platform.processor()
  info = Path('/proc/cpuinfo')
  if info.exists():
    lines = info.read_text().splitlines()
    cpu = next(
      (x.partition(':')[2].strip() for x in lines if x.startswith('flags')), cpu
    )
  names = [w for w in cpu.split() if w.startswith(('avx', 'amx', 'fma'))]
  names = ' '.join(sorted(names))
  return f'jax {jax.__version__}, {platform.machine()} {names}'


def main_program(argv):
  sys.path.insert(0, '.')
  flags.FLAGS.mark_as_parsed()
  # Or nothing would be split at this size.
  sharding.MIN_SHARDED_BYTES = 2**15
  path = Path(argv[1])
  names = argv[2:] or list(RECIPES)
  results = {'machine': describe_machine(), 'recipes': {}}
  if path.exists() and path.stat().st_size:
    results = json.loads(path.read_text())
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    write_toy_videos(folder / 'toy', 12)
    backbone = folder / 'backbone'
    if any(n.startswith(('probe', 'decoder')) or 'teacher' in n for n in names):
      run(make_config('small:random', folder, backbone), backbone)
    for i, name in enumerate(names):
      print(f'{i + 1}/{len(names)} {name}', flush=True)
      config = make_config(name, folder, folder / str(i))
      results['recipes'][name] = run(config, folder / str(i))
      path.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  main_program(sys.argv)
