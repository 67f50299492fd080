"""What a run leaves of its config, and which recipes can be shrunk."""

import errno
import json
import logging
import types

import jax
import numpy as np
import pytest
from tiny import IMAGES, make_config

from configs import decoder, probe, small
from vjepa_jax.parallel import hosts
from vjepa_jax.tasks import pretrain as pretraining
from vjepa_jax.tasks import session
from vjepa_jax.tasks.decoder import train_decoder
from vjepa_jax.tasks.pretrain import pretrain
from vjepa_jax.tasks.probe import probe as train_probe
from vjepa_jax.tasks.quickstart import quickstart
from vjepa_jax.tools import command
from vjepa_jax.training.telemetry import read_metrics


@pytest.fixture(scope='module')
def run(toy_videos, tmp_path_factory):
  """A short run: its config and its workdir."""
  config = make_config(toy_videos, {'total_steps': 1})
  config.diagnose_every_steps, config.learning_rate.warmup_steps = 0, 0
  workdir = tmp_path_factory.mktemp('session')
  assert int(pretrain(config, workdir).step) == 1
  return config, workdir


def _read(workdir):
  return json.loads((workdir / 'config.json').read_text())


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'total_steps': 0}, 'is at step 1, past the 0 of this config'),
    ({'predictor.width': 96}, 'is of another model'),
    ({'data.batch_size': 9}, 'a batch of 9 clips is not divisible by 8 data'),
    ({'clip.num_clips': 3}, 'is not divisible by 1 hosts x 3 clips a video'),
    ({'optimizer.kind': 'muon'}, 'is of another model or optimizer'),
  ],
)
def test_a_refused_command_leaves_the_config(run, changes, message):
  config, workdir = run
  before = _read(workdir)
  assert before['total_steps'] == 1
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    pretrain(config, workdir)
  assert _read(workdir) == before


def test_what_fails_before_the_loop_is_one_line_and_leaves_nothing_open(
  run, monkeypatch, capsys
):
  config, workdir = run
  closed = []
  for kind in (session.Checkpoints, session.Feed):

    def close(self, kind=kind, before=kind.close):
      closed.append(kind)
      before(self)

    monkeypatch.setattr(kind, 'close', close)
  path = workdir / 'metrics.jsonl'

  def fail(*_, **__):
    raise PermissionError(errno.EACCES, 'Permission denied', str(path))

  monkeypatch.setattr(session, 'Telemetry', fail)
  assert command.guard(lambda: pretrain(config, workdir)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and str(path) in line
  assert closed == [session.Feed, session.Checkpoints]


def test_a_resumed_run_says_what_changed(run, caplog):
  config, workdir = run
  config = config.copy_and_resolve_references()
  config.log_every_steps, config.checkpoint.keep = 7, 5
  before = read_metrics(workdir)
  with caplog.at_level(logging.INFO, logger='absl'):
    pretrain(config, workdir)
  said = [r.getMessage() for r in caplog.records if 'was' in r.getMessage()]
  assert said == [
    'config.checkpoint.keep is 5 from step 1 on, was 2',
    'config.log_every_steps is 7 from step 1 on, was 1',
  ]
  assert _read(workdir)['checkpoint']['keep'] == 5
  # A finished run has nothing left to do, and does nothing.
  assert read_metrics(workdir) == before


def test_other_data_must_be_accepted(run, toy_videos, tmp_path, caplog):
  config, workdir = run
  config = config.copy_and_resolve_references()
  lines = toy_videos.read_text().splitlines()[1:]
  manifest = tmp_path / 'fewer.csv'
  manifest.write_text(
    ''.join(f'{toy_videos.parent}/{line}\n' for line in lines)
  )
  config.data.sources.toy.path = str(manifest)
  with pytest.raises(
    ValueError, match='step 1: toy was 24 .* is 23 videos, .*T'
  ):
    pretrain(config, workdir)
  config.data.changed = True
  assert pretrain(config, workdir) is not None
  assert 'the data is not that of step 1: toy was 24 videos' in caplog.text


def test_images_go_on_where_they_were(toy_videos, tmp_path, monkeypatch):
  config = make_config(
    toy_videos, IMAGES | {'image.sources.images.path': str(toy_videos)}
  )
  loaders = [pretraining.make_loader(config, x) for x in ('video', 'image')]
  started = {}

  def train(state, train_step, feed, cadence, **options):
    batches = [next(feed) for _ in range(3 - state.step)]
    return jax.device_get(batches), feed.progress

  monkeypatch.setattr(session.loop, 'train', train)
  for step in (0, 1):
    folder = tmp_path / str(step)
    run = session.Session(config, folder, loaders[0], None, loaders[1])
    run._model, run._progress = {}, {'samples': 8 * step, 'images': 16 * step}
    state = types.SimpleNamespace(step=step)
    started[step], progress = run.train(state, None)
    assert progress == {'samples': 24, 'images': 48}
  assert started[0][0]['image']['pixels'].shape == (16, 1, 64, 64, 3)
  jax.tree.map(np.testing.assert_array_equal, started[0][1:], started[1])
  assert set(run._data) == {'toy', 'image.images'}
  assert run._data['image.images'].startswith('24 images, names ')


def test_hosts_must_see_the_same_data(run, monkeypatch):
  config, workdir = run

  def gather(text):
    return [text, text.replace('24 videos', '23 videos')]

  monkeypatch.setattr(hosts, 'gather', gather)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='process 1 has data.toy 23 videos, nam'):
    pretrain(config, workdir)


def test_a_config_that_was_cut_off_is_written_anew(run):
  config, workdir = run
  path = workdir / 'config.json'
  before = path.read_text()
  path.write_text(before[:40])
  assert pretrain(config, workdir) is not None
  assert _read(workdir)['total_steps'] == 1


@pytest.mark.slow
def test_a_shrunk_quickstart_is_its_pretraining(tmp_path):
  config = small.get_config('future')
  config.smoke = True
  assert int(quickstart(config, tmp_path).step) == 4
  lines = read_metrics(tmp_path)
  assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4]
  probes = [line['step'] for line in lines if 'probe_knn' in line]
  assert probes == [0, 4]
  assert not (tmp_path / 'results.json').exists()
  assert _read(tmp_path)['task'] == 'pretrain'


@pytest.mark.parametrize(
  'recipe,task', [(probe, train_probe), (decoder, train_decoder)]
)
def test_what_needs_a_backbone_cannot_be_shrunk(recipe, task, tmp_path):
  config = recipe.get_config()
  config.smoke = True
  with pytest.raises(ValueError, match='for recipes of pretraining, fine-'):
    task(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
