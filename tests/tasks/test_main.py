"""main.py as a user runs it on one host: interrupted, resumed, mistaken."""

import json
import os
import shlex
import signal
import subprocess
import sys

from processes import ROOT, TINY, finish, read_losses, wait_for_step
import pytest
from tiny import IMAGES

from configs import vjepa21
from vjepa_jax.tools import command, train


@pytest.fixture(scope='module')
def whole(launcher, tmp_path_factory):
  """Workdir of a run that was left alone, and what it printed."""
  workdir = tmp_path_factory.mktemp('whole')
  output = finish(launcher.start(workdir, '--profile_steps=10:12'))  # the last
  return workdir, output


def test_killed_run_resumes_with_the_same_numbers(launcher, whole, tmp_path):
  killed = launcher.start(tmp_path)
  wait_for_step(tmp_path, 4)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  assert 'resumed from step' in finish(launcher.start(tmp_path))
  expected = read_losses(whole[0])
  assert list(expected) == list(range(1, 13))
  assert read_losses(tmp_path) == expected


def test_profile_is_a_trace_of_the_steps(whole):
  workdir, output = whole
  assert 'trace of steps 10 to 12' in output
  assert list((workdir / 'profile').rglob('*.xplane.pb'))


@pytest.mark.slow
def test_killed_stages_with_images_resume_with_the_same_numbers(
  launcher, toy_videos, tmp_path
):
  images = IMAGES | {'image.sources.images.path': toy_videos}
  common = [f'--config.{name}={value}' for name, value in images.items()]
  teacher = tmp_path / 'teacher'
  finish(launcher.start(teacher, *common))
  distill = [
    f'--config.objective.vjepa21.teacher={teacher}',
    '--config.encoder.size=mini',
  ]
  stages = {
    'cooldown': [f'--config.init_from={teacher}'],
    'distill_1': distill,
    'distill_2': [
      *distill,
      f'--config.init_from={tmp_path / "distill_1"}',
      '--config.init_average=True',
    ],
  }
  for name, flags in stages.items():
    whole, killed = tmp_path / name, tmp_path / f'{name}_killed'
    finish(launcher.start(whole, *common, *flags))
    process = launcher.start(killed, *common, *flags)
    wait_for_step(killed, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = finish(launcher.start(killed, *common, *flags))
    assert 'resumed from step' in output
    expected = read_losses(whole)
    assert list(expected) == list(range(1, 13))
    assert read_losses(killed) == expected


@pytest.mark.slow
def test_the_stages_of_vjepa21_run_as_their_recipe_says(
  tmp_path, compilation_cache
):
  text = vjepa21.__doc__.partition('Options:')[0]
  commands = [shlex.split(x) for x in text.splitlines() if 'main.py' in x]
  assert len(commands) == 4
  for _, main, *flags in commands:
    subprocess.run(
      [sys.executable, ROOT / main, *flags, '--config.smoke=True'],
      cwd=tmp_path,
      env=os.environ
      | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_COMPILATION_CACHE_DIR': str(compilation_cache),
      },
      check=True,
      timeout=600,
    )
  teacher = json.loads((tmp_path / 'runs/l16/teacher.json').read_text())
  assert teacher == {'path': 'runs/G16_cooldown', 'step': 4}
  assert list(read_losses(tmp_path / 'runs/l16')) == [1, 2, 3, 4]


def test_preempted_run_saves_and_leaves(launcher, tmp_path):
  process = launcher.start(tmp_path, '--config.total_steps=100000')
  wait_for_step(tmp_path, 4)
  process.send_signal(signal.SIGTERM)
  output = finish(process, code=75)
  assert 'preempted: saved step' in output
  saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert f'saved step {saved};' in output
  assert max(read_losses(tmp_path)) == saved


@pytest.mark.parametrize(
  'flags,message',
  [
    (['dance'], "unknown argument 'dance'"),
    (['--nosuch=1'], "Unknown command line flag 'nosuch'"),
    (['--profile_steps=5'], '--profile_steps=5 is not FIRST:LAST'),
    (
      ['--profile_steps=5:99'],
      'profile_steps 5:99 must lie within the 12 steps',
    ),
    (
      ['--config.encoder.sise=tiny'],
      'there is no config.encoder.sise; config.encoder has init_std, levels',
    ),
    (['--config.batchsize=9'], 'there is no config.batchsize; config has atte'),
    (['--workdir=main.py/below'], 'main.py is a file, not a directory'),
    (['--config.attention=cudnn'], "there is 'auto', which is 'xla' here"),
    (['--config.task=dance'], "config.task 'dance' does not exist"),
    (['--config=configs/vjepa1.py:x99'], "variant 'x99' is not one of ['l16'"),
    (
      ['--config.data.batch_size=8', '--config.clip.num_clips=3'],
      'batch size 8 is not divisible by 1 hosts x 3',
    ),
  ],
)
def test_a_mistake_is_one_clear_line(
  toy_videos, tmp_path, monkeypatch, capsys, flags, message
):
  config = f'--config={TINY}:{toy_videos}', f'--workdir={tmp_path}'
  monkeypatch.setattr(sys, 'argv', ['main.py', *config, *flags])

  def parse_and_run():
    options, words = command.parse(train.main, train.define_flags, sys.argv[1:])
    return train.main(options, *words)

  assert command.guard(parse_and_run) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and message in line


@pytest.mark.parametrize(
  'flag,message',
  [
    ('--config=configs/vjep1.py', 'no such file; recipes of the package are'),
    ('--config.data.sources.toy.path=/no/such/folder', '/no/such/folder'),
  ],
)
def test_nothing_else_is_shown_of_a_mistake(launcher, tmp_path, flag, message):
  output = finish(launcher.start(tmp_path, flag), code=2)
  assert 'Traceback' not in output and 'Usage' not in output
  line = output.strip().splitlines()[-1]
  assert line.startswith('error: ') and message in line


def test_where_a_mistake_was_found_is_shown_on_demand(launcher, tmp_path):
  flags = '--config.data.batch_size=9', '--verbosity=1'
  output = finish(launcher.start(tmp_path, *flags, devices=2), code=2)
  assert 'Traceback' in output
  assert 'UserError: a batch of 9 clips' in output


def test_an_error_in_training_is_no_mistake_of_the_user(launcher, tmp_path):
  flags = '--config.learning_rate.value=nan', '--config.max_skipped=2'
  output = finish(launcher.start(tmp_path, *flags), code=1)
  assert 'Traceback' in output and 'FloatingPointError: loss or' in output
