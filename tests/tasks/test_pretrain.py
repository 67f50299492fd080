"""Pretraining in this process: every recipe, and what goes wrong early."""

import importlib
import json

from etils import epath
import jax
import numpy as np
import pytest
from tiny import make_config

from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.tasks import pretrain as pretraining
from vjepa_jax.tasks.initial import take_over
from vjepa_jax.tasks.program import (
  build_program,
  get_grid,
  get_steps,
  list_streams,
)
from vjepa_jax.training import checkpoint
from vjepa_jax.training.telemetry import read_metrics

RECIPES = [
  *(f'vjepa1:{size}' for size in ('l16', 'h16', 'h16_384')),
  *(
    f'vjepa2:{size},stage={stage}'
    for size in ('l16', 'h16', 'g16')
    for stage in ('pretrain', 'cooldown_256', 'cooldown_384')
  ),
  'vjepa21:l16,stage=pretrain',
  'vjepa21:l16,stage=cooldown',
  'vjepa21:G16,stage=cooldown,numbers=release,data=mixture',
  'small:random',
  'small:future',
  'physics:',
]


@pytest.mark.parametrize('name', RECIPES)
def test_at_full_size_everything_fits_together(name, toy_videos):
  """Down to the mask counts; that recipes run is what test_golden.py shows."""
  recipe, _, argument = name.partition(':')
  config = importlib.import_module(f'configs.{recipe}').get_config(argument)
  for source in [*config.data.sources.values(), config.image.sources.images]:
    source.path = str(toy_videos)
  for stream in list_streams(config):
    loader = pretraining.make_loader(config, stream)
    assert loader.name == stream and loader.num_clips == 1
    for sampler in loader.mask_samplers:
      assert sampler.grid == get_grid(config, stream) and sampler.check() > 0.7


def test_each_source_is_cut_as_it_says(toy_videos):
  config = make_config(toy_videos)
  path = config.data.sources.toy.path
  config.data.sources = dict(
    plain=dict(path=path, weight=0.5),
    slow=dict(path=path, weight=0.5, fps=2.0, frames=2, frame_step=None),
  )
  loader = pretraining.make_loader(config)
  plain, slow = loader.source_options
  assert (plain.frame_step, plain.fps) == (config.clip.frame_step, None)
  assert (slow.frame_step, slow.fps, slow.distinct) == (None, 2.0, 2)


def test_folder_with_broken_videos_runs_and_names_them(toy_videos, tmp_path):
  videos = tmp_path / 'videos'
  videos.mkdir()
  originals = sorted(toy_videos.parent.glob('*.mp4'))
  for path in originals[:18]:
    (videos / path.name).write_bytes(path.read_bytes())
  # Two of twenty, each broken in a way of its own.
  (videos / 'cut.mp4').write_bytes(originals[0].read_bytes()[:700])
  (videos / 'garbage.mp4').write_bytes(b'no video at all ' * 99)
  # And one that killed a run before.
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'exclude.txt').write_text(f'{originals[2].name}\n')
  config = make_config(videos, {'total_steps': 6})
  assert pretraining.pretrain(config, tmp_path / 'run') is not None
  lines = (tmp_path / 'run' / 'quarantine.jsonl').read_text().splitlines()
  reasons = {e['name']: e['reason'] for e in map(json.loads, lines)}
  assert reasons.pop(originals[2].name) == 'excluded, it killed its reader'
  assert sorted(reasons) == ['cut.mp4', 'garbage.mp4'] and len(lines) == 3
  assert all('not a video' in reason for reason in reasons.values())
  # Between two and three passes over the videos met each as often.
  assert 6 <= read_metrics(tmp_path / 'run')[-1]['replaced_videos'] <= 12


def test_a_later_stage_takes_over_the_state(toy_videos, tmp_path):
  first = pretraining.pretrain(make_config(toy_videos), tmp_path / 'first')
  config = make_config(
    toy_videos, {'total_steps': 1, 'init_from': str(tmp_path / 'first')}
  )
  config.learning_rate.update(
    kind='constant', start=0.0, value=0.0, final=0.0, warmup_steps=0
  )
  config.ema.update(kind='constant', value=1.0)
  config.masks.short.subset = 'first'
  second = pretraining.pretrain(config, tmp_path / 'second')
  jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
  jax.tree.map(np.testing.assert_array_equal, second.target, first.target)
  assert int(second.step) == 1  # its own count
  assert int(second.opt_state.count) == 3  # the moments' goes on
  # Distillation takes the average, and starts the moments anew.
  program = build_program(config, make_mesh(1), 1, 1)
  third = take_over(config.init_from, program, 0, average=True)
  for found in (third.params['encoder'], third.target):
    jax.tree.map(np.testing.assert_array_equal, found, first.target)
  jax.tree.map(
    np.testing.assert_array_equal,
    third.params['predictor'],
    first.params['predictor'],
  )
  assert not any(np.any(x) for x in jax.tree.leaves(third.opt_state))


def test_an_evaluation_loads_the_target_alone(toy_videos, tmp_path):
  state = pretraining.pretrain(make_config(toy_videos), tmp_path)
  abstract = jax.eval_shape(lambda x: x, state.target)
  shardings = jax.tree.map(lambda x: x.sharding, state.target)
  target = checkpoint.load_item(tmp_path, abstract, shardings)
  jax.tree.map(np.testing.assert_array_equal, target, state.target)
  with pytest.raises(checkpoint.CheckpointError, match='holds no checkpoints'):
    checkpoint.load_item(tmp_path / 'no', abstract, shardings)


def test_another_models_checkpoint_is_refused(toy_videos, tmp_path):
  pretraining.pretrain(make_config(toy_videos, {'total_steps': 1}), tmp_path)
  config = make_config(toy_videos, {'predictor.width': 96})
  with pytest.raises(
    checkpoint.CheckpointError,
    match='is of another model: params/predictor/embed/bias has shape .48,',
  ):
    pretraining.pretrain(config, tmp_path)


def test_a_hopeless_run_stops(toy_videos, tmp_path):
  config = make_config(toy_videos, {'total_steps': 9, 'max_skipped': 3})
  config.learning_rate.update(kind='constant', value=float('nan'))
  with pytest.raises(FloatingPointError, match='steps 2 to 4: go back to an'):
    pretraining.pretrain(config, tmp_path)


_IMAGES = {
  'image.batch_size': 8,
  'image.sources.images.path': 'TOY',
  'image.mask_names': ('short',),
  'image.resolution': 64,
}


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'data.batch_size': 12}, 'a batch of 12 clips is not divisible by 8 data'),
    (
      {'probe.train': 'TOY', 'probe.test': 'TOY', 'probe.batch_size': 9},
      'probe.batch_size 9 is not divisible by 8 devices',
    ),
    ({'fsdp': 5}, '8 devices do not split into fsdp groups of 5'),
    ({'data.sources.toy.path': ''}, 'sources.toy.path is empty: give a folder'),
    ({'mask_names': ()}, 'mask_names is empty'),
    (_IMAGES | {'image.mask_names': ()}, 'config.image.mask_names is empty'),
    (
      _IMAGES | {'image.sources.images.path': ''},
      'config.image.sources.images.path is empty: give a folder',
    ),
    ({'mask_names': ('wide',)}, "mask_names has 'wide', config.masks only"),
    ({'total_steps': None}, 'set config.total_steps or config.total_epochs'),
    ({'total_epochs': 3.0}, 'set total_steps or total_epochs, not both'),
    ({'clip.resolution': 36}, 'height of the clip, 36, is not a multiple'),
    (_IMAGES | {'image.batch_size': 12}, 'of 12 clips is .*: change config.im'),
    (
      _IMAGES,
      "'vjepa' is not trained on streams .'image'.: set config.im",
    ),
    (
      {'objective.kind': 'vjepa21', 'objective.vjepa21.teacher': None},
      'objective.vjepa21.teacher is not set: give the workdir',
    ),
    ({'encoder.size': 'big'}, "encoder size 'big' is not one of"),
    ({'objective.vjepa.target_view': 'x'}, "target_view 'x' is not one of"),
    ({'objective.kind': 'x'}, "objective.kind 'x' is not one of"),
    ({'optimizer.kind': 'x'}, "optimizer kind 'x' is not one of"),
    ({'microbatches': 2, 'data.batch_size': 16}, 'of a batch: set config'),
    ({'learning_rate.warmup_steps': 99}, '99 warm-up steps do not fit'),
  ],
)
def test_mistakes_fail_before_anything_is_compiled(
  toy_videos, tmp_path, changes, message
):
  toy = str(toy_videos)
  changes = {k: toy if v == 'TOY' else v for k, v in changes.items()}
  with pytest.raises(ValueError, match=message):
    pretraining.pretrain(make_config(toy, changes), tmp_path)
  assert not (epath.Path(tmp_path) / 'checkpoints').exists()


def test_epochs_are_passes_over_the_data(toy_videos):
  config = make_config(toy_videos, {'total_steps': None, 'total_epochs': 2.0})
  assert get_steps(config, 'total', 24 / 8) == 6
