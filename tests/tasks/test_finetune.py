"""Fine-tuning in this process: it learns, resumes, and is of use after."""

import json
import math

import jax
import numpy as np
import pytest

from configs import finetune as recipe
import vjepa_jax
from vjepa_jax.data import sources
from vjepa_jax.data.clip import ClipOptions, read_clips
from vjepa_jax.interop.load import read_weights
from vjepa_jax.tasks import finetune as task
from vjepa_jax.tasks.finetune import finetune
from vjepa_jax.tasks.smoke import shrink
from vjepa_jax.training import loop
from vjepa_jax.training.telemetry import read_metrics


@pytest.fixture(scope='module')
def config(toy_videos, tmp_path_factory):
  """The recipe of SSv2 at toy size, one test video of which is damaged."""
  folder = tmp_path_factory.mktemp('finetune')
  config = shrink(recipe.get_config('ssv2'), folder)
  lines = toy_videos.read_text().splitlines()[:9]
  lines = [f'{toy_videos.parent}/{line}' for line in lines]
  # So few that all of them are seen in every step.
  for name, part in (('train', lines[:8]), ('test', ['gone.mp4 1', *lines])):
    config.data[name] = str(folder / f'{name}.csv')
    (folder / f'{name}.csv').write_text('\n'.join(part) + '\n')
  config.clip.update(frames=4, resolution=32, crop_scale=(0.9, 1.0))
  config.encoder.update(init_std=0.0, pixel_norm='clip')
  config.total_steps = 40
  config.learning_rate.update(value=0.1, final=1e-3, warmup_steps=5)
  config.checkpoint.every_steps = 20
  config.evaluation.every_steps = 40
  config.fsdp = 2
  return config


@pytest.fixture(scope='module')
def run(config, tmp_path_factory):
  """An uninterrupted run: its workdir and what it returned."""
  workdir = tmp_path_factory.mktemp('run')
  return workdir, finetune(config, workdir)


def test_it_learns_from_labels(run):
  workdir, results = run
  losses = [line['loss'] for line in read_metrics(workdir) if 'loss' in line]
  assert len(losses) == 40
  # Chance is log 4; smoothing of .1 leaves .36 at best.
  assert losses[0] == pytest.approx(math.log(4), abs=0.2)
  assert np.mean(losses[-5:]) < 0.7 * math.log(4)
  tested = [line for line in read_metrics(workdir) if 'test_top1' in line]
  assert [line['step'] for line in tested] == [0, 40]
  assert tested[-1]['test_top1'] == results['top1'] > tested[0]['test_top1']
  assert json.loads((workdir / 'results.json').read_text()) == results
  assert (results['test_videos'], results['left_out']) == (9, 1)


def test_a_resumed_run_gives_the_same_numbers(
  run, config, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop.Preemption, 'reached', lambda self, step: step == 17)
  assert finetune(config, tmp_path) is None
  monkeypatch.undo()
  # The run of the backbone, which is read once, may have gone on.
  later = {'backbone': 'random init', 'fingerprint': 'later'}
  monkeypatch.setattr(task, 'describe_backbone', lambda *_: later)
  results = finetune(config, tmp_path)
  workdir, expected = run
  measured = ('seconds', 'clips_per', 'data_wait', 'goodput', 'share_')

  def keep(numbers):
    return {k: v for k, v in numbers.items() if not k.startswith(measured)}

  assert keep(results) == keep(expected)
  assert [keep(m) for m in read_metrics(tmp_path)] == [
    keep(m) for m in read_metrics(workdir)
  ]
  ours, theirs = (read_weights(path) for path in (tmp_path, workdir))
  for a, b in (
    (ours.encoder_params, theirs.encoder_params),
    (ours.probes[0][1], theirs.probes[0][1]),
  ):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_stays_on_its_backbone(run, config):
  workdir, _ = run
  config = config.copy_and_resolve_references()
  config.backbone = str(workdir)
  message = f'was started on random init, and {workdir} is another backbone'
  with pytest.raises(ValueError, match=message):
    finetune(config, workdir)


def test_the_result_is_a_backbone_and_a_classifier(run, config):
  workdir, results = run
  model = vjepa_jax.load(workdir)
  assert (model.frames, model.resolution) == (4, 32)
  ((probe, params),) = read_weights(workdir).probes
  source = sources.open_source(config.data.test)
  options = ClipOptions(frames=4, resolution=32, frame_step=2, num_clips=2)
  records = [source[i] for i in range(1, 10)]
  clips = np.concatenate([read_clips(record, options) for record in records])
  logits = probe.apply({'params': params}, model.encode(clips))
  shares = jax.nn.softmax(logits).reshape(9, 2, 4).mean(axis=1)
  hits = shares.argmax(axis=1) == np.array([record.label for record in records])
  assert hits.mean() == pytest.approx(results['top1'])
  assert probe.num_classes == 4 and model.encoder.drop_path_rate == 0


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'data.train': ''}, 'config.data.train is empty: give a manifest'),
    ({'data.batch_size': 12}, 'a batch of 12 clips is not divisible by 8 d'),
    ({'evaluation.batch_size': 9}, 'evaluation.batch_size 9 is not divisible'),
    ({'num_classes': 3}, 'has label 3, training needs one from 0 to 2'),
    ({'clip.frames': None}, 'backbone does not say: set config.clip.frames'),
    ({'clip.resolution': 36}, 'height of the clip, 36, is not a multiple'),
    ({'backbone': '/nowhere'}, '/nowhere'),
  ],
)
def test_mistakes_fail_early(config, tmp_path, changes, message):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    finetune(config, tmp_path)


def test_videos_without_labels_are_named(config, toy_videos, tmp_path):
  config = config.copy_and_resolve_references()
  config.data.train = str(toy_videos.parent)
  # Reading all labels takes long: what else is wrong is said before.
  wrong = config.copy_and_resolve_references()
  wrong.data.batch_size = 12
  with pytest.raises(ValueError, match='a batch of 12 clips'):
    finetune(wrong, tmp_path)
  with pytest.raises(ValueError, match='0000.mp4 has no label'):
    finetune(config, tmp_path)
