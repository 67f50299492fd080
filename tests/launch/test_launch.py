"""Launch scripts: what they would run, and how they restart, for real."""

import os
from pathlib import Path
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))
# What a shell on the way might take apart or expand.
ARGUMENTS = [
  '--config=configs/vjepa2.py:g16',
  '--config.data.sources.videos.path=/data/a b/*.array_record',
  '--workdir=/runs/it\'s "mine" $HOME `id`',
]


@pytest.fixture
def tools(tmp_path):
  """A folder of fake programs, first on the PATH."""
  folder = tmp_path / 'bin'
  folder.mkdir()

  def add(name, text):
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\n{text}\n')
    path.chmod(0o755)

  add.environment = {
    'PATH': f'{folder}:{os.environ["PATH"]}',
    'HOME': str(tmp_path),
    'PAUSE': '0',
  }
  return add


def _run(script, *arguments, cwd=ROOT, **environment):
  return subprocess.run(
    ['bash', str(ROOT / 'launch' / script), *arguments],
    cwd=cwd,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=60,
  )


def _dry_run(script, *arguments, **environment):
  result = _run(script, *arguments, DRY_RUN='1', **environment)
  assert result.returncode == 0, result.stderr
  # bash alone understands all that its printf %q writes.
  words = subprocess.run(
    ['bash', '-c', f"printf '%s\\0' {result.stdout}"],
    capture_output=True,
    text=True,
    check=True,
  )
  return words.stdout.split('\0')[:-1]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
  subprocess.run(['bash', '-n', str(script)], check=True)
  beside = shutil.which('shellcheck', path=Path(sys.executable).parent)
  shellcheck = beside or shutil.which('shellcheck')
  if shellcheck is None:
    pytest.skip("shellcheck is not installed: pip install -e '.[test]'")
  subprocess.run([shellcheck, '-x', str(script)], cwd=ROOT, check=True)


@pytest.mark.parametrize(
  'device,gpu,extra',
  [
    ('0x0063', True, '.[tpu]'),
    ('0x0042', True, '.[cuda]'),  # a network card
    ('0x0042', False, '.'),
  ],
)
def test_installation_says_what_it_found(tools, tmp_path, device, gpu, extra):
  card = tmp_path / 'pci' / '0000:00:04.0'
  card.mkdir(parents=True)
  (card / 'vendor').write_text('0x1ae0\n')
  (card / 'device').write_text(device + '\n')
  tools('nvidia-smi', f'echo "GPU 0: H100"; exit {int(not gpu)}')
  settings = tools.environment | {'DRY_RUN': '1', 'PCI': str(card.parent)}
  result = _run('install.sh', **settings)
  assert result.stdout.endswith(f"installing '{extra}'\n")


# The command: it writes down its arguments, and ends with the codes of a file,
# one a run; then it is done.
_FAKE_PYTHON = """
printf '%s\\n' "$@" > "$HOME/arguments"
echo run >> "$HOME/runs"
code="$(head -n 1 "$HOME/codes" 2>/dev/null)"
sed -i 1d "$HOME/codes" 2>/dev/null
echo "training, will end with ${code:-0}"
exit "${code:-0}"
"""


def _count_runs(home):
  return len((home / 'runs').read_text().splitlines())


@pytest.mark.parametrize(
  'codes,runs,end',
  [
    ([], 1, 0),
    ([1, 134], 3, 0),  # two failures, then done
    ([2, 0], 1, 2),  # a mistake
    ([75, 75, 75, 75, 134, 137], 7, 0),  # preempted, which does not count
    ([1, 1, 137, 0], 3, 137),  # too many failures
  ],
)
def test_exit_codes_decide_about_a_restart(tools, tmp_path, codes, runs, end):
  tools('python', _FAKE_PYTHON)
  (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in codes))
  result = _run(
    'restart.sh', 'python', *ARGUMENTS, RETRIES='2', **tools.environment
  )
  assert result.returncode == end, result.stderr
  assert _count_runs(tmp_path) == runs
  assert (tmp_path / 'arguments').read_text().splitlines() == ARGUMENTS


def test_what_a_killed_run_leaves_behind_is_ended(tools, tmp_path):
  # A worker that outlives the command, as after a SIGKILL.
  tools(
    'python',
    '(while :; do date >> "$HOME/alive"; sleep .05; done) &\n'
    'until [ -e "$HOME/alive" ]; do sleep .02; done; kill -KILL $$',
  )
  result = _run('restart.sh', 'python', RETRIES='0', **tools.environment)
  assert result.returncode == 137, result.stderr
  time.sleep(0.2)
  size = (tmp_path / 'alive').stat().st_size
  time.sleep(0.3)
  assert (tmp_path / 'alive').stat().st_size == size


def test_who_is_stopped_saves_and_is_not_restarted(tools, tmp_path):
  tools(
    'python',
    'trap "sleep .3; echo saved; exit 75" TERM; echo up > "$HOME/up"\n'
    'while :; do sleep .05; done',
  )
  process = subprocess.Popen(
    ['bash', 'launch/restart.sh', 'python'],
    cwd=ROOT,
    env=os.environ | tools.environment,
    text=True,
    stdout=subprocess.PIPE,
  )
  _wait_for(tmp_path / 'up')
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=20)
  assert (process.returncode, output) == (75, 'saved\n')


def _wait_for(path):
  deadline = time.monotonic() + 20
  while not path.exists():
    assert time.monotonic() < deadline, f'{path} never came'
    time.sleep(0.02)


# Stands for gcloud: two workers, each of them a shell on this machine.
_FAKE_GCLOUD = f"""#!{sys.executable}
import os, pathlib, shutil, subprocess, sys
home = pathlib.Path(os.environ['HOME'])
if 'scp' in sys.argv:
  for host in ('pod-w-0', 'pod-w-1'):
    shutil.copy(sys.argv[sys.argv.index('scp') + 1], home / host)
  sys.exit()
(home / 'gcloud').write_text(' '.join(sys.argv[1:-1]))
command = sys.argv[-1].removeprefix('--command=')
workers = [
  subprocess.Popen(
    ['bash', '-c', command],
    cwd=home / host,
    env=os.environ | {{'HOME': str(home / host), 'FAKE_HOST': host}},
  )
  for host in ('pod-w-0', 'pod-w-1')
]
sys.exit(max(worker.wait() for worker in workers))
"""


@pytest.fixture
def pod(tools, tmp_path):
  """Runs tpu_pod.sh on a pod whose workers live in folders of `tmp_path`."""
  for host in ('pod-w-0', 'pod-w-1'):
    folder = tmp_path / host / 'vjepa_jax' / 'launch'
    folder.mkdir(parents=True)
    shutil.copy(ROOT / 'launch' / 'restart.sh', folder)
    (folder / 'environment.sh').write_text('echo "with extra $1"\n')
  tools('hostname', 'echo "$FAKE_HOST"')
  tools('python', _FAKE_PYTHON)
  (tmp_path / 'bin' / 'gcloud').write_text(_FAKE_GCLOUD)
  (tmp_path / 'bin' / 'gcloud').chmod(0o755)
  settings = tools.environment | {'TPU': 'pod', 'ZONE': 'us-east5-b'}

  def run(*arguments, **environment):
    return _run('tpu_pod.sh', *arguments, **settings, **environment)

  run.settings = settings
  return run


def _write_codes(tmp_path, *codes):
  for host in ('pod-w-0', 'pod-w-1'):
    text = ''.join(f'{code}\n' for code in codes)
    (tmp_path / host / 'codes').write_text(text)


def test_pod_runs_on_all_workers_and_restarts(pod, tmp_path):
  _write_codes(tmp_path, 1, 75, 134)
  result = pod(*ARGUMENTS, RETRIES='2')
  assert result.returncode == 0, result.stderr
  assert (tmp_path / 'gcloud').read_text() == (
    'compute tpus tpu-vm ssh pod --zone=us-east5-b --worker=all'
  )
  for host in ('pod-w-0', 'pod-w-1'):
    assert _count_runs(tmp_path / host) == 4
    arguments = (tmp_path / host / 'arguments').read_text().splitlines()
    assert arguments == ['main.py', '--coordinator=auto', *ARGUMENTS]
    log = tmp_path / host / 'vjepa_jax' / 'logs' / f'{host}.log'
    assert log.read_text().count('training, will end with') == 4
    # Everybody's troubles are seen here, the rest of worker 0 alone.
    assert f'{host}: restart.sh: ' in result.stdout
    assert 'failed with code 134, restart 2 of 2' in result.stdout
  assert 'pod-w-0: training, will end with 75' in result.stdout
  assert 'pod-w-1: training' not in result.stdout


def test_pod_does_not_repeat_a_mistake(pod, tmp_path):
  _write_codes(tmp_path, 2, 0)
  assert pod(*ARGUMENTS).returncode == 2
  assert _count_runs(tmp_path / 'pod-w-0') == 1


def test_pod_gives_up_after_so_many_failures(pod, tmp_path):
  _write_codes(tmp_path, 1, 1, 1, 1)
  assert pod(*ARGUMENTS, RETRIES='1').returncode == 1
  assert _count_runs(tmp_path / 'pod-w-1') == 2


def test_pod_trains_on_without_us_and_stops_when_told(pod, tools, tmp_path):
  tools(
    'python',
    'trap "echo saved >> $HOME/saved; exit 75" TERM; echo up > "$HOME/up"\n'
    'while :; do sleep .05; done',
  )
  process = subprocess.Popen(
    ['bash', 'launch/tpu_pod.sh', *ARGUMENTS],
    cwd=ROOT,
    env=os.environ | pod.settings,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  for host in ('pod-w-0', 'pod-w-1'):
    _wait_for(tmp_path / host / 'up')
  # The connection is lost, with all that hangs on it.
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  again = pod(*ARGUMENTS)
  assert again.returncode == 2 and 'pod-w-1: runs already' in again.stderr
  result = pod('stop')
  assert result.returncode == 0, result.stderr
  assert 'pod-w-1: restart.sh: ' in result.stdout
  for host in ('pod-w-0', 'pod-w-1'):
    assert (tmp_path / host / 'saved').read_text() == 'saved\n'
  assert 'pod-w-0: no run' in pod('logs').stderr


# A Python that makes environments of itself, and writes down what it installs.
_NEW_PYTHON = """case "$*" in
  "-m venv"*)
    [[ "$*" != *--clear* ]] || rm -rf .venv
    mkdir -p .venv/bin && cp --no-clobber "$0" .venv/bin/python
    echo made >> "$HOME/made" ;;
  "-m pip install"*) echo "$*" >> "$HOME/installed" ;;
  main.py*) echo "$0" >> "$HOME/ran" ;;
esac"""


@pytest.fixture
def old_machine(tools):
  """Makes all Pythons of the machine too old; apt brings another."""
  for name in ('python3', *(f'python3.{i}' for i in range(11, 15))):
    tools(name, 'echo "Python 3.10"; exit 1')
  tools('new_python', _NEW_PYTHON)
  tools(
    'sudo',
    'echo "$*" >> "$HOME/sudo"\n'
    'if [[ "$*" == *install* ]]; then\n'
    '  cp "$(command -v new_python)" "$HOME/new"\n'
    '  mv "$HOME/new" "$(dirname "$0")/python3.11"\nfi',
  )


def test_pod_is_set_up_with_code_and_python(pod, old_machine, tmp_path):
  hosts = [tmp_path / 'pod-w-0', tmp_path / 'pod-w-1']
  for host in hosts:
    shutil.rmtree(host / 'vjepa_jax')
  missing = pod(*ARGUMENTS)
  assert missing.returncode == 2 and 'setup brings it' in missing.stderr
  result = pod('setup')
  assert result.returncode == 0, result.stderr
  for host in hosts:
    repository = host / 'vjepa_jax'
    for file in ('main.py', 'launch/restart.sh', 'vjepa_jax/errors.py'):
      assert (repository / file).read_bytes() == (ROOT / file).read_bytes()
    assert not (repository / '.git').exists()
    assert '--editable .[tpu,gcs]' in (host / 'installed').read_text()
    assert f'{host.name}: ' in result.stdout
  # Here the workers share a machine: the first may have done it for both.
  told = ''.join(path.read_text() for path in tmp_path.glob('pod-w-*/sudo'))
  assert 'python3.11-venv' in told
  # The Python that is named is the one that trains.
  (tmp_path / 'bin' / 'python3.11').unlink()
  for host in hosts:
    shutil.rmtree(host / 'vjepa_jax' / '.venv')
  python = str(tmp_path / 'bin' / 'new_python')
  assert pod(*ARGUMENTS, PYTHON=python).returncode == 0
  for host in hosts:
    venv = host / 'vjepa_jax' / '.venv' / 'bin' / 'python'
    assert (host / 'ran').read_text() == f'{venv}\n'


@pytest.mark.parametrize('damage', ['no pip', 'old', 'no python'])
def test_a_half_made_environment_is_made_again(tools, tmp_path, damage):
  tools('python3.14', _NEW_PYTHON)
  python = tmp_path / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  if damage == 'no python':
    python.symlink_to(tmp_path / 'gone')
  else:
    pip = '"-m pip --version" | "-m ensurepip" | "-I "*'
    failing = pip if damage == 'no pip' else '"-c "*'
    python.write_text(f'#!/bin/bash\ncase "$*" in {failing}) exit 1 ;; esac\n')
    python.chmod(0o755)
  script = (
    f'set -e; source {ROOT}/launch/environment.sh test; command -v python'
  )
  for _ in range(2):
    result = subprocess.run(
      ['bash', '-c', script],
      cwd=tmp_path,
      env=os.environ | tools.environment,
      capture_output=True,
      text=True,
    )
    assert result.stdout == f'{python}\n', result.stderr
  # The second found it whole.
  assert (tmp_path / 'installed').read_text().count('.[test]') == 2
  assert (tmp_path / 'made').read_text() == 'made\n'


def test_an_environment_without_pip_that_has_the_package_is_kept(
  tools, tmp_path
):
  tools('python3.14', _NEW_PYTHON)
  python = tmp_path / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(
    '#!/bin/bash\ncase "$*" in "-m "*) exit 1 ;; "-I "*) echo "$*" ;; esac\n'
  )
  python.chmod(0o755)
  result = subprocess.run(
    ['bash', '-c', f'set -e; source {ROOT}/launch/environment.sh test'],
    cwd=tmp_path,
    env=os.environ | tools.environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == '-I -c import vjepa_jax\n'
  assert "'.[test]' should be in it" in result.stderr
  assert not (tmp_path / 'made').exists()


def test_pod_says_how_it_is_used(pod):
  result = pod('run')
  assert result.returncode == 2 and 'usage: ' in result.stderr
  command = _dry_run('tpu_pod.sh', *ARGUMENTS, **pod.settings)
  assert command[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh']
  assert '--worker=all' in command


def test_slurm_starts_one_task_a_gpu_that_sees_all(tools):
  command = _dry_run('slurm.sh', *ARGUMENTS, SLURM_CPUS_PER_TASK='12')
  assert command[0] == 'srun' and command[-3:] == ARGUMENTS
  # Without it the workers of a task would share one core.
  assert '--cpus-per-task=12' in command
  assert '.venv/bin/python' in command
  assert '/a b/python' in _dry_run('slurm.sh', RUN_PYTHON='/a b/python')
  # That is what makes environments.
  assert '.venv/bin/python' in _dry_run('slurm.sh', PYTHON='/a b/python')
  # jax takes the GPU of the task's number: all of them must be visible.
  assert '--gpu-bind=none' in command and '--coordinator=auto' in command
  # A task that hangs must not outlive the others.
  assert '--kill-on-bad-exit=1' in command
  text = (ROOT / 'launch' / 'slurm.sh').read_text()
  assert '#SBATCH --gpus-per-node=8\n' in text
  assert '#SBATCH --ntasks-per-node=8\n' in text
  assert '--gpus-per-task' not in text


@pytest.mark.parametrize(
  'codes,requeued',
  [([0], 0), ([2], 0), ([75, 75, 75, 0], 3), ([1, 134, 137, 1], 2)],
)
def test_slurm_requeues(tools, tmp_path, codes, requeued):
  (tmp_path / 'logs').mkdir()
  tools('srun', _FAKE_PYTHON)
  tools('scontrol', 'echo "$@" >> "$HOME/requeued"')
  (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in codes))
  settings = tools.environment | {
    'SLURM_JOB_ID': '7',
    'SLURM_SUBMIT_DIR': str(tmp_path),
    'RETRIES': '2',
  }
  for i in range(requeued + 1):
    result = _run('slurm.sh', *ARGUMENTS, **settings)
    assert result.returncode == codes[i], result.stderr
  told = tmp_path / 'requeued'
  lines = told.read_text().splitlines() if told.exists() else []
  assert lines == ['requeue 7'] * requeued
  assert (tmp_path / 'arguments').read_text().splitlines()[-3:] == ARGUMENTS


def test_multislice_workload_restarts_unless_it_made_a_mistake():
  settings = {
    'CLUSTER': 'c',
    'PROJECT': 'p',
    'ZONE': 'us-east5-b',
    'TPU_TYPE': 'v6e-256',
    'SLICES': '4',
  }
  command = _dry_run('gke_multislice.sh', 'run1', *ARGUMENTS, **settings)
  assert command[:3] == ['xpk', 'workload', 'create']
  options = dict(part[2:].split('=', 1) for part in command[3:])
  assert options['num-slices'] == '4' and options['workload'] == 'run1'
  assert options['restart-on-exit-codes'] == '1,75'
  assert int(options['max-restarts']) > 10
  assert options['script-dir'] == str(ROOT)
  prefix, _, run = options['command'].partition(' && ')
  assert prefix == 'pip install --quiet --editable .[tpu,gcs]'
  assert shlex.split(run) == [
    *['exec', 'python', 'main.py', '--coordinator=auto'],
    *ARGUMENTS,
  ]
  ready = _dry_run(
    'gke_multislice.sh', 'run1', *ARGUMENTS, IMAGE='me/image:1', **settings
  )
  assert '--docker-image=me/image:1' in ready
  assert not any(part.startswith('--script-dir') for part in ready)
