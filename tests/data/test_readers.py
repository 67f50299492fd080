"""Readers that a video kills, or whose parent is killed."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

from killers import Endless, Killer, Killers, Once, Terminated
import pytest
from test_pipeline import OPTIONS, _assert_same, _loader, _take

from vjepa_jax.data import readers, sources, storage
from vjepa_jax.data.readers import find_killers, open_journal
from vjepa_jax.data.video import DecodeError

_KILLER, _ENDLESS, _ONCE = 3, 17, 8
_BATCHES = 6  # all videos once
_PARENT = """
from test_pipeline import _loader, _take
from vjepa_jax.data import pipeline

if __name__ == '__main__':
  dataset = pipeline.make_batches(
    _loader([{videos!r}]), weights=[1.0], batch_size=4, num_workers=2
  )
  iterator = iter(dataset)
  next(iterator)
  print('reading', flush=True)
  while True:
    next(iterator)
"""


def _make_loader(videos, workdir, replaced):
  options = dataclasses.replace(OPTIONS, max_seconds=0.3)
  loader = _loader([videos], options)
  source = Killers(loader.sources[0], replaced)
  journal = open_journal(str(workdir), 0)
  return dataclasses.replace(loader, sources=(source,), journal=journal)


def test_what_kills_workers_is_excluded_and_nothing_else_changes(
  toy_videos, tmp_path
):
  damaged = _make_loader(toy_videos, tmp_path, {_KILLER: b'no video'})
  expected = _take(damaged, _BATCHES)
  # Another worker dies of nothing that happens again.
  videos = sources.open_source(str(toy_videos))
  once = Once(pathlib.Path(videos[_ONCE].video).read_bytes())
  once.marker = tmp_path / 'died'
  killers = {_KILLER: Killer(b'v'), _ONCE: once}
  loader = _make_loader(toy_videos, tmp_path, killers)
  batches = _take(loader, _BATCHES, num_workers=1, num_threads=1)
  assert once.marker.exists()
  _assert_same(batches, expected)
  name = loader.sources[0][_KILLER].name
  excluded = (tmp_path / 'exclude.txt').read_text()
  assert excluded == f'{toy_videos}: {name}\n'
  (failure,) = [f for batch in batches for f in batch['failures'].tolist()]
  assert json.loads(failure) == [
    {'name': name, 'reason': 'excluded, it killed its reader'}
  ]
  # What was in hand at the end is not suspected by the next run.
  assert not loader.journal.take()


@pytest.mark.slow
def test_what_never_comes_back_is_found_among_others(
  toy_videos, tmp_path, monkeypatch
):
  monkeypatch.setattr(readers, 'MAX_TRIES', 1)
  # What is ended from outside is not blamed.
  replaced = {_ENDLESS: Endless(b'v'), 5: Terminated(b'v')}
  loader = _make_loader(toy_videos, tmp_path, replaced)
  source = loader.sources[0]
  names = [f'{source.path}: {record.name}' for record in source]
  notes = [(i, (0, key), names[key]) for i, key in enumerate((2, _ENDLESS, 5))]
  killers = find_killers(loader, notes)
  assert killers == {names[_ENDLESS]: 'which did not come back'}


def test_who_is_killed_is_blamed_only_for_every_time():
  kill, end = -signal.SIGKILL, -signal.SIGTERM
  blamed = [[-signal.SIGSEGV], [end, -signal.SIGABRT], [kill, kill, kill]]
  assert all(map(readers.is_to_blame, blamed))
  others = [[kill], [kill, kill], [kill, end, kill], [end, end, end], [1]]
  assert not any(map(readers.is_to_blame, others))


def _read_all(videos, workdir):
  loader = _make_loader(videos, workdir, {_KILLER: Killer(b'v')})
  _take(loader, _BATCHES, num_threads=2)


@pytest.mark.slow
def test_a_run_without_workers_dies_and_its_successor_goes_on(
  toy_videos, tmp_path
):
  process = multiprocessing.get_context('spawn').Process(
    target=_read_all, args=(toy_videos, tmp_path)
  )
  process.start()
  process.join()
  assert process.exitcode == -signal.SIGSEGV
  assert not (tmp_path / 'exclude.txt').exists()
  loader = _make_loader(toy_videos, tmp_path, {_KILLER: Killer(b'v')})
  batches = _take(loader, _BATCHES)
  name = loader.sources[0][_KILLER].name
  excluded = (tmp_path / 'exclude.txt').read_text()
  assert excluded == f'{toy_videos}: {name}\n'
  damaged = _make_loader(toy_videos, tmp_path, {_KILLER: b'no video'})
  _assert_same(batches, _take(damaged, _BATCHES))


def test_a_note_is_there_while_a_video_is_read(tmp_path):
  journal = open_journal(str(tmp_path), 0)
  with journal.reading('a "video".mp4', 'b', 7, (0, 5)):
    (note,) = pathlib.Path(journal.folder).iterdir()
    content = note.read_bytes()
  assert not note.read_bytes().startswith(content[:1])
  note.write_bytes(content)
  assert journal.take() == [(7, (0, 5), 'b: a "video".mp4')]
  assert not journal.take()


def test_equal_names_are_told_apart_by_their_source(tmp_path):
  journal = open_journal(str(tmp_path), 0)
  journal.exclude({'x: a.mp4': 'SIGSEGV', 'b.mp4': 'by hand'})
  journal = open_journal(str(tmp_path), 0)
  with journal.reading('a.mp4', 'y', 0, (1, 0)):
    pass
  for name, source in (('a.mp4', 'x'), ('b.mp4', 'y')):
    with pytest.raises(DecodeError), journal.reading(name, source, 0, (0, 0)):
      pass


@pytest.mark.parametrize('address', ['{}', 'memory://journal{}'])
def test_all_hosts_obey_all_exclude_files(tmp_path, address):
  workdir = address.format(tmp_path / 'set[1]')
  storage.make_folder(workdir)
  open_journal(workdir, 0).exclude({'a.mp4': 'SIGSEGV'})
  open_journal(workdir, 2).exclude({'b.mp4': 'SIGKILL'})
  open_journal(workdir, 2).exclude({'c.mp4': 'SIGKILL'})
  assert storage.read(f'{workdir}/exclude-2.txt') == b'b.mp4\nc.mp4\n'
  journal = open_journal(workdir, 1)
  assert journal.excluded == {'a.mp4', 'b.mp4', 'c.mp4'}
  assert os.path.isdir(os.path.dirname(journal.folder))  # a local disk


def test_workers_end_when_their_parent_is_killed(toy_videos, tmp_path):
  script = tmp_path / 'parent.py'
  script.write_text(_PARENT.format(videos=str(toy_videos)))
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  with subprocess.Popen(
    [sys.executable, script],
    stdout=subprocess.PIPE,
    text=True,
    env=environment,
  ) as parent:
    assert parent.stdout.readline() == 'reading\n'
    workers = [p for p in _list_processes() if _get_parent(p) == parent.pid]
    assert len(workers) >= 2
    parent.kill()
  deadline = time.monotonic() + 60
  while any(map(_is_alive, workers)):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _list_processes():
  return [int(p) for p in os.listdir('/proc') if p.isdigit()]


def _read_status(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(') ')[2]
  except OSError:
    return 'X 0'


def _get_parent(pid):
  return int(_read_status(pid).split()[1])


def _is_alive(pid):
  return _read_status(pid)[0] not in 'XZ'
