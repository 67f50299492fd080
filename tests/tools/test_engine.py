"""Which machine writes which shards, and Beam."""

from types import SimpleNamespace

from commands import run_command, start_command
import pytest

from vjepa_jax.errors import UserError
from vjepa_jax.sets.toy import write_toy_videos
from vjepa_jax.tools import engine, prepare

ARRAY = {
  f'SLURM_ARRAY_TASK_{k}': v
  for k, v in (('ID', '9'), ('MIN', '1'), ('STEP', '2'), ('COUNT', '8'))
}


@pytest.fixture(autouse=True)
def no_array(monkeypatch):
  for name in (*ARRAY, 'JOB_COMPLETION_INDEX'):
    monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
  'index,count,environment,expected',
  [
    (None, None, {}, (0, 1)),
    # A sweep, whose tasks have each a whole output.
    (None, None, ARRAY, (0, 1)),
    (2, '5', ARRAY, (2, 5)),
    (None, 'auto', ARRAY, (4, 8)),
    (None, '6', ARRAY | {'JOB_COMPLETION_INDEX': '1'}, (4, 6)),
    (None, '3', {'JOB_COMPLETION_INDEX': '2'}, (2, 3)),
  ],
)
def test_a_machine_knows_its_number(
  index, count, environment, expected, monkeypatch, caplog
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  options = SimpleNamespace(host_index=index, num_hosts=count)
  with caplog.at_level('INFO'):
    assert engine.find_host(options) == expected
  # It says so, and who said it.
  told = 'flags' if index else next(iter(environment), None)
  assert not count or caplog.text.endswith(f'by {told}\n')


@pytest.mark.parametrize(
  'index,count,environment,message',
  [
    (1, None, {}, '--host_index needs --num_hosts'),
    (None, '3', {}, '--num_hosts=3 needs --host_index: this is no task'),
    (None, 'auto', {}, '--num_hosts=auto needs --host_index'),
    (3, '3', {}, 'is not one of --num_hosts=3, which count from 0'),
    (None, 'auto', {'JOB_COMPLETION_INDEX': '2'}, 'give --num_hosts a number'),
    (1, 'two', {}, '--num_hosts=two is neither a number nor auto'),
    (None, '3', ARRAY, 'machine 4, by SLURM_ARRAY_TASK_ID, is not one of'),
  ],
)
def test_a_machine_without_a_number_is_a_mistake(
  index, count, environment, message, monkeypatch
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  options = SimpleNamespace(host_index=index, num_hosts=count)
  with pytest.raises(UserError, match=message):
    engine.find_host(options)


def _read_files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def videos(tmp_path):
  write_toy_videos(tmp_path / 'videos', 6)
  (tmp_path / 'videos' / 'bad.mp4').write_text('no video')
  return tmp_path / 'videos'


def test_beam_is_an_extra(videos, tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'apache_beam', None)
  flags = f'--input={videos}', f'--output={tmp_path}', '--engine=beam'
  with pytest.raises(UserError, match=r"pip install -e '.\[beam\]'"):
    run_command(prepare, *flags)


@pytest.mark.slow
def test_beam_makes_the_same_shards(videos, tmp_path):
  pytest.importorskip('apache_beam', reason='the extra beam has it')
  flags = f'--input={videos}', '--short_side=32', '--shard_size=2'
  run_command(prepare, *flags, f'--output={tmp_path / "one"}')
  out = tmp_path / 'beam'
  beam = '--direct_running_mode=multi_processing --direct_num_workers=2'
  arguments = *flags, f'--output={out}', '--engine=beam', f'--beam={beam}'
  # A shard that cannot be written does not end the others.
  blocking = out / 'videos-00001-of-00004.bad.jsonl'
  blocking.mkdir(parents=True)
  failed = start_command('prepare', *arguments)
  assert failed.returncode == 1, failed.stderr
  assert '1 of 4 shards were not written' in failed.stderr
  assert len(list(out.glob('*.array_record'))) == 3
  blocking.rmdir()
  done = start_command('prepare', *arguments)
  assert done.returncode == 0, done.stderr
  assert '1 of 4 shards are missing' in done.stderr
  assert _read_files(out) == _read_files(tmp_path / 'one')
  wrong = start_command('prepare', *arguments, '--short_side=16')
  assert wrong.returncode == 2
  assert "'short_side': 32" in wrong.stderr.splitlines()[-1]
  assert 'Traceback' not in wrong.stderr
