"""Several processes: the numbers of one, and one end for all."""

import os
import shutil
import signal
import time

import jax
import numpy as np
from processes import finish, finish_all, read_losses, wait_for_step
import pytest
import tiny

from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.tasks.program import build_program
from vjepa_jax.training.checkpoint import restore
from vjepa_jax.training.telemetry import read_metrics

STEPS = 8
# Without collapse statistics, which would be one more program to compile.
FLAGS = (
  f'--config.total_steps={STEPS}',
  '--config.diagnose_every_steps=0',
  '--config.checkpoint.keep=9',
)
# 24 clips do not divide into batches of 10, nor labels into those of hosts.
PROBE = (
  f'--config.probe.every_steps={STEPS}',
  '--config.probe.batch_size=10',
  '--config.probe.attentive_labels=17',
  '--config.probe.attentive_steps=100',
)
PARTS = 'train', 'test'
# Long, but with the schedules of the short run: the same program, from cache.
ENDLESS = (
  *FLAGS,
  '--config.total_steps=100000',
  f'--config.schedule_scale={1.25 * STEPS / 100000}',
)


def _read_checkpoint(workdir, step, toy_videos, size='nano'):
  """Reads a whole checkpoint onto one device; returns it and the position."""
  mesh = mesh_lib.make_mesh(1, jax.devices()[:1])
  config = tiny.get_config(str(toy_videos))
  config.encoder.size = size
  program = build_program(config, mesh, 8, 3)
  state, progress = restore(workdir, program.abstract, program.shardings)
  assert state.step == step
  return jax.device_get(state), progress['samples']


@pytest.fixture(scope='module')
def run(launcher, toy_videos, tmp_path_factory):
  """Runs once on so many processes with so many devices; gives the workdir."""
  workdirs = {}

  def run(processes, devices, fsdp=1, size='nano'):
    key = processes, devices, fsdp, size
    if key not in workdirs:
      workdir = tmp_path_factory.mktemp(f'run_{processes}x{devices}')
      flags = (*FLAGS, f'--config.fsdp={fsdp}', f'--config.encoder.size={size}')
      if (processes, devices) in ((1, 2), (2, 1)):
        flags += (*PROBE, *(f'--config.probe.{x}={toy_videos}' for x in PARTS))
      if processes == 1:
        finish(launcher.start(workdir, *flags, devices=devices))
      else:
        two = launcher.start_two(workdir, *flags, devices=devices)
        assert '2 hosts' in finish_all(two)[0]
      workdirs[key] = workdir
    return workdirs[key]

  return run


def test_two_processes_do_what_one_does_bit_for_bit(run, toy_videos):
  # Two summands: whoever adds them, the sum is the same.
  one, two = run(1, 2), run(2, 1)
  assert list(read_losses(one)) == list(range(1, STEPS + 1))
  assert read_losses(two) == read_losses(one)
  expected, position = _read_checkpoint(one, STEPS, toy_videos)
  state, other_position = _read_checkpoint(two, STEPS, toy_videos)
  assert other_position == position == STEPS * 8
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  # Each host has decoded half of the clips of the probes, and trained them.
  scores, others = (
    [
      {k: v for k, v in line.items() if k.startswith('probe_')}
      for line in read_metrics(workdir)
      if 'probe_attentive' in line
    ]
    for workdir in (one, two)
  )
  assert len(scores) == len(others) == 2
  for score, other in zip(scores, others, strict=True):
    attentive = score.pop('probe_attentive')
    assert attentive > 0.5  # chance is a quarter
    # Means over hosts are summed in another order: a clip may tip over.
    assert other.pop('probe_attentive') == pytest.approx(attentive, abs=0.05)
    assert score == other and score.keys() == {'probe_knn', 'probe_linear'}
  (last,) = [m for m in read_metrics(two) if m.get('loss') and m['step'] == 8]
  assert last['data_wait_host'] in (0, 1) and last['replaced_videos'] == 0


@pytest.mark.slow
def test_two_processes_share_images_too(launcher, toy_videos, tmp_path):
  images = tiny.IMAGES | {'image.sources.images.path': toy_videos}
  flags = [*FLAGS, *(f'--config.{k}={value}' for k, value in images.items())]
  finish(launcher.start(tmp_path / 'one', *flags, devices=2))
  finish_all(launcher.start_two(tmp_path / 'two', *flags))
  assert len(read_losses(tmp_path / 'one')) == STEPS
  assert read_losses(tmp_path / 'two') == read_losses(tmp_path / 'one')


@pytest.mark.parametrize('before,after', [((1, 2), (2, 1)), ((2, 1), (1, 2))])
def test_another_number_of_processes_resumes(
  run, launcher, tmp_path, toy_videos, before, after
):
  whole = run(*before)
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  files = (tmp_path / 'checkpoints' / str(STEPS)).rglob('*')
  largest = max(filter(os.path.isfile, files), key=os.path.getsize)
  os.truncate(largest, 99)
  if after[0] == 1:
    outputs = [finish(launcher.start(tmp_path, *FLAGS, devices=after[1]))]
  else:
    outputs = finish_all(launcher.start_two(tmp_path, *FLAGS, devices=after[1]))
  for output in outputs:
    assert 'set aside as damaged_8' in output
    assert 'resumed from step 4' in output
  assert read_losses(tmp_path) == read_losses(whole)
  expected, position = _read_checkpoint(whole, STEPS, toy_videos)
  state, other_position = _read_checkpoint(tmp_path, STEPS, toy_videos)
  assert other_position == position
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def _assert_close(run, toy_videos, runs, size):
  """Compares the first of some runs, (processes, devices, fsdp), with others.

  Not bit for bit: four summands are added in another order by gloo, by one
  process for its devices, and by one device over its rows. Measured: losses
  differ by 1e-6 of themselves, parameters by 3e-6 and the rest by 1e-7.
  """
  workdirs = [run(*shape, size) for shape in runs]
  two, *others = (
    (
      list(read_losses(workdir).values()),
      *_read_checkpoint(workdir, STEPS, toy_videos, size),
    )
    for workdir in workdirs
  )
  for losses, state, position in others:
    np.testing.assert_allclose(two[0], losses, rtol=3e-6)
    assert two[1].step == state.step == STEPS
    assert two[2] == position == STEPS * 8
    for name, limit in (
      ('params', 1e-5),
      ('target', 1e-6),
      ('opt_state', 1e-6),
    ):
      jax.tree.map(
        lambda a, b, limit=limit: np.testing.assert_allclose(a, b, atol=limit),
        getattr(two[1], name),
        getattr(state, name),
      )


@pytest.mark.slow
def test_four_devices_on_two_processes_with_fsdp(run, toy_videos):
  # Wide enough to be split.
  _assert_close(run, toy_videos, [(2, 2, 2), (1, 4, 2)], 'micro')


@pytest.mark.slow
def test_four_devices_do_what_one_does(run, toy_videos):
  _assert_close(run, toy_videos, [(2, 2, 2), (1, 1, 1)], 'micro')
  _assert_close(run, toy_videos, [(2, 2, 1), (1, 4, 1), (1, 1, 1)], 'nano')


def test_hosts_agree_on_when_to_leave(launcher, tmp_path):
  two = launcher.start_two(tmp_path, *ENDLESS)
  wait_for_step(tmp_path, 4)
  two[1].send_signal(signal.SIGTERM)
  outputs = finish_all(two, code=75)
  saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert all(f'preempted: saved step {saved};' in out for out in outputs)


def _finish_after(signal_, two, victim):
  """Signals one process; returns seconds and output until the other ends."""
  two[victim].send_signal(signal_)
  start = time.monotonic()
  output, _ = two[1 - victim].communicate(timeout=120)
  # What restart.sh, slurm.sh and tpu_pod.sh take for a failure.
  assert two[1 - victim].returncode not in (0, 2, 75), output
  return time.monotonic() - start, output


@pytest.mark.parametrize('victim', [0, 1], ids=['coordinator', 'other'])
def test_when_a_process_is_killed_the_other_ends(launcher, tmp_path, victim):
  two = launcher.start_two(tmp_path, *ENDLESS)
  wait_for_step(tmp_path, 4)
  seconds, output = _finish_after(signal.SIGKILL, two, victim)
  assert seconds < 60


@pytest.mark.slow  # It takes as long as a silence is borne.
@pytest.mark.parametrize('victim', [0, 1], ids=['coordinator', 'other'])
def test_when_a_process_freezes_the_other_ends(launcher, tmp_path, victim):
  two = launcher.start_two(tmp_path, *ENDLESS, '--heartbeat_seconds=10')
  wait_for_step(tmp_path, 4)
  seconds, output = _finish_after(signal.SIGSTOP, two, victim)
  assert 5 < seconds < 60


def test_a_mistake_of_all_hosts_ends_all(launcher, tmp_path):
  two = launcher.start_two(tmp_path, '--profile_steps=5:99')
  message = 'profile_steps 5:99 must lie within the 12 steps'
  for process in two:
    assert message in finish(process, code=2).strip().splitlines()[-1]


def test_processes_that_differ_do_not_start(launcher, tmp_path):
  two = launcher.start_two(
    tmp_path, only_second=('--config.data.batch_size=16',)
  )
  for process in two:
    line = finish(process, code=2).strip().splitlines()[-1]
    assert line.startswith('error: process 1 has config.data.batch_size 16, ')
  assert not (tmp_path / 'checkpoints').exists()
