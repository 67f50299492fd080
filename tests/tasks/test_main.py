"""main.py as a user runs it: interrupted, resumed, on one host or on two."""

import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / 'tests' / 'tasks' / 'tiny.py'


@pytest.fixture
def start(toy_videos, compilation_cache):
  """Starts main.py on the tiny recipe; ends what a test leaves running."""
  processes = []

  def run(workdir, *flags, devices=1, config=f'{TINY}:{toy_videos}'):
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
      'JAX_COMPILATION_CACHE_DIR': str(compilation_cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
    }
    command = [
      sys.executable,
      'main.py',
      f'--config={config}',
      f'--workdir={workdir}',
      *flags,
    ]
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    processes.append(process)
    return process

  yield run
  for process in processes:
    process.kill()


def _finish(process, code=0):
  output, _ = process.communicate(timeout=300)
  assert process.returncode == code, output
  return output


def _wait_for_step(workdir, step):
  deadline = time.monotonic() + 200
  while not (workdir / 'checkpoints' / str(step)).exists():
    assert time.monotonic() < deadline, 'no checkpoint came'
    time.sleep(0.02)


def _losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  steps = [line['step'] for line in lines]
  assert steps == sorted(set(steps))  # nothing twice
  return {line['step']: line['loss'] for line in lines}


def test_killed_run_resumes_with_the_same_numbers(start, tmp_path):
  _finish(start(tmp_path / 'whole'))
  killed = start(tmp_path / 'killed')
  _wait_for_step(tmp_path / 'killed', 4)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  output = _finish(start(tmp_path / 'killed'))
  assert 'resumed from step' in output
  expected = _losses(tmp_path / 'whole')
  assert list(expected) == list(range(1, 13))
  assert _losses(tmp_path / 'killed') == expected
  # A finished run has nothing left to do, and says so by doing nothing.
  _finish(start(tmp_path / 'killed'))
  assert _losses(tmp_path / 'killed') == expected


def test_preempted_run_saves_and_leaves(start, tmp_path):
  process = start(tmp_path, '--config.total_steps=100000')
  _wait_for_step(tmp_path, 4)
  process.send_signal(signal.SIGTERM)
  output = _finish(process, code=75)
  assert 'preempted: saved step' in output
  saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert f'saved step {saved};' in output
  assert max(_losses(tmp_path)) == saved


def _start_two(start, workdir, *flags):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  return [
    start(
      workdir,
      f'--coordinator=127.0.0.1:{port}',
      '--num_processes=2',
      f'--process_index={i}',
      *flags,
    )
    for i in range(2)
  ]


def test_one_process_resumes_as_two_with_the_same_numbers(start, tmp_path):
  _finish(start(tmp_path / 'one', devices=2))
  _finish(start(tmp_path / 'two', '--config.checkpoint.keep=9', devices=2))
  for step in ('8', '12'):
    shutil.rmtree(tmp_path / 'two' / 'checkpoints' / step)
  outputs = [_finish(p) for p in _start_two(start, tmp_path / 'two')]
  assert all('resumed from step 4' in output for output in outputs)
  assert '2 hosts' in outputs[0]
  assert _losses(tmp_path / 'two') == _losses(tmp_path / 'one')


def test_hosts_agree_on_when_to_leave(start, tmp_path):
  processes = _start_two(start, tmp_path, '--config.total_steps=100000')
  _wait_for_step(tmp_path, 4)
  processes[1].send_signal(signal.SIGTERM)
  outputs = [_finish(process, code=75) for process in processes]
  saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert all(f'preempted: saved step {saved};' in out for out in outputs)


def test_profile_is_a_trace_of_the_steps(start, tmp_path):
  output = _finish(start(tmp_path, '--profile_steps=5:7'))
  assert 'trace of steps 5 to 7' in output
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.parametrize(
  'flags,message',
  [
    (['--profile_steps=5'], '--profile_steps=5 is not FIRST:LAST'),
    (
      ['--profile_steps=5:99'],
      'profile_steps 5:99 must lie within the 12 steps',
    ),
    (['--config.encoder.sise=tiny'], 'sise'),
    (['--config.task=dance'], "config.task 'dance' does not exist"),
    (
      ['--config.data.batch_size=9', '--config.clip.num_clips=2'],
      'batch size 9 is not divisible by 1 hosts x 2 clips',
    ),
    (['--config.data.sources.toy.path=/no/such/folder'], '/no/such/folder'),
  ],
)
def test_wrong_flags_are_one_clear_line(start, tmp_path, flags, message):
  output, _ = start(tmp_path, *flags).communicate(timeout=120)
  assert message in output.strip().splitlines()[-1] or (
    message in output and 'Usage' not in output
  ), output
