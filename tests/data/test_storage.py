"""What is read and written is the same wherever it is."""

import os
import pathlib

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import pytest

from vjepa_jax.data import clip, decode, pipeline, sources, storage
from vjepa_jax.data.records import Record
from vjepa_jax.errors import UserError
from vjepa_jax.tools import command
from vjepa_jax.tools.prepare import convert, prepare


@pytest.fixture(params=['memory', 'gs'])
def remote(request):
  """An address that nothing is at."""
  if request.param == 'gs':
    request.getfixturevalue('gcs')
  else:
    fsspec.filesystem('memory').store.clear()
  return f'{request.param}://bucket/{request.node.originalname}'


@pytest.fixture
def failing(monkeypatch):
  """Makes memory:// fail; returns what it raises next, and what was asked."""
  errors, asked = [], []
  read = MemoryFileSystem.cat_file

  def cat_file(self, path, **options):
    asked.append(path)
    if errors:
      raise errors.pop(0)
    return read(self, path, **options)

  monkeypatch.setattr(MemoryFileSystem, 'cat_file', cat_file)
  monkeypatch.setattr(storage, '_PAUSES', (0, 0))
  storage.replace('memory://bucket/video.mp4', b'not quite a video')
  return errors, asked


def test_files(remote):
  path = f'{remote}/folder/file.txt'
  assert not storage.exists(path) and not storage.exists(remote)
  storage.make_folder(f'{remote}/folder')
  storage.replace(path, 'ab\n')
  assert storage.read(path) == b'ab\n' and storage.measure(path) == 3
  storage.replace(path, 'whole')
  assert storage.read(path) == b'whole'
  assert storage.read_range(path, 1, 3) == b'ho'
  assert storage.exists(path) and not storage.is_folder(path)
  assert storage.is_folder(remote) and storage.is_folder(f'{remote}/folder/')
  with storage.replacing(path) as temporary:
    with open(temporary, 'w') as file:
      file.write('uploaded')
    assert storage.read(path) == b'whole'
  assert storage.read(path) == b'uploaded'
  with storage.local_copy(path) as copy, open(copy) as file:
    assert file.read() == 'uploaded'
  with storage.writing_folder(f'{remote}/written') as folder:
    (folder / 'deep').mkdir()
    (folder / 'deep' / 'x').write_text('x')
  assert storage.read(f'{remote}/written/deep/x') == b'x'
  assert sorted(storage.list_files(remote)) == [
    path,
    f'{remote}/written/deep/x',
  ]
  assert storage.list_files(f'{remote}/*/*.txt') == [path]
  with pytest.raises(FileNotFoundError, match='nothing does not exist'):
    storage.list_files(f'{remote}/nothing')
  with storage.local_copy(f'{remote}/written/') as copy:
    assert pathlib.Path(copy, 'deep', 'x').read_text() == 'x'
  storage.remove(path)
  storage.remove(path)
  assert not storage.exists(path)
  assert not os.path.exists(f'{remote.partition(":")[0]}:')


def test_hosts_that_write_the_same_file_do_not_meet(tmp_path, monkeypatch):
  path = tmp_path / 'file'
  with storage.replacing(path) as ours:
    pathlib.Path(ours).write_text('ours')
    monkeypatch.setattr(os, 'getpid', lambda: 1)
    storage.replace(path, 'theirs')
  assert path.read_text() == 'ours'
  with storage.replacing(path) as ours:
    pass  # as if removed by who had found the file there
  assert path.read_text() == 'ours'
  with pytest.raises(KeyboardInterrupt), storage.replacing(path) as ours:
    pathlib.Path(ours).touch()
    raise KeyboardInterrupt
  assert list(tmp_path.iterdir()) == [path]


def test_sources(remote, toy_videos):
  storage.upload_folder(toy_videos.parent, remote)
  whole = [(storage.read(r.video), r.label, r.name) for r in _open(toy_videos)]
  for path, labelled in [
    (f'{remote}/{toy_videos.name}', True),
    (remote, False),
    (f'{remote}/', False),
    (f'{remote}/**/*.mp4', False),
  ]:
    found = [(storage.read(r.video), r.label, r.name) for r in _open(path)]
    if labelled:
      assert found == whole
    else:
      assert [video for video, *_ in found] == [video for video, *_ in whole]
  with decode.open_video(_open(remote)[0].video) as video:
    assert video.num_frames > 1


def _open(path):
  return sources.open_source(str(path))


def test_a_folder_is_listed_once(monkeypatch):
  listed = []
  find = MemoryFileSystem.find

  def count(self, path, *arguments, **options):
    listed.append(path)
    return find(self, path, *arguments, **options)

  monkeypatch.setattr(MemoryFileSystem, 'find', count)
  for name in ('a.mp4', 'b.mp4'):
    storage.replace(f'memory://bucket/listed/{name}', b'x')
  source = _open('memory://bucket/listed')
  assert [record.name for record in source] == ['a.mp4', 'b.mp4']
  assert listed == ['memory://bucket/listed']


def test_what_fails_for_the_moment_is_asked_again(failing):
  errors, asked = failing
  errors += [ConnectionResetError('gone'), TimeoutError()]
  assert storage.read('memory://bucket/video.mp4') == b'not quite a video'
  assert len(asked) == 3


@pytest.mark.parametrize('kind', [ConnectionResetError, RuntimeError])
def test_storage_that_fails_is_no_damaged_video(failing, kind):
  errors, asked = failing
  errors += [kind('gone')] * 3
  with pytest.raises(storage.StorageError, match='video.mp4: .*gone'):
    decode.open_video('memory://bucket/video.mp4')
  assert len(asked) == 3
  # One that is damaged, or is not there, still is.
  with pytest.raises(decode.DecodeError, match='not a video'):
    decode.open_video('memory://bucket/video.mp4')
  with pytest.raises(decode.DecodeError, match='does not exist'):
    decode.open_video('memory://bucket/nothing.mp4')


def test_a_run_ends_and_may_go_on_where_storage_fails(failing, capsys):
  errors, _ = failing
  storage.replace('memory://bucket/run.csv', 'video.mp4')
  source = _open('memory://bucket/run.csv')
  loader = pipeline.SampleLoader((source,), clip.ClipOptions(), (), seed=0)
  errors += [ConnectionResetError('gone')] * 3
  assert command.guard(lambda: loader(0, (0, 0))) == command.FAILURE
  assert 'error: StorageError: memory://bucket/' in capsys.readouterr().err


@pytest.mark.parametrize(
  'error', [OSError('Forbidden: bucket\nno access'), PermissionError('Forbids')]
)
def test_what_is_not_allowed_is_not_asked_again(failing, capsys, error):
  errors, asked = failing
  errors += [error, error]
  path = 'memory://bucket/video.mp4'
  with pytest.raises(storage.AccessError):
    convert(Record(path, -1, 'video.mp4'), None)
  assert command.guard(lambda: decode.open_video(path)) == command.MISTAKE
  assert 'error: memory://bucket/video.mp4: Forb' in capsys.readouterr().err
  assert len(asked) == 2


def test_a_missing_package_and_a_wrong_scheme_are_named(monkeypatch):
  def find(scheme):
    raise ImportError('Please install gcsfs to access GCS')

  with pytest.raises(ValueError, match='Protocol not known: nowhere'):
    storage.exists('nowhere://bucket/x')
  monkeypatch.setattr(fsspec, 'filesystem', find)
  with pytest.raises(UserError, match=r"install 'vjepa_jax\[gcs\]'"):
    storage.exists('gs://bucket/x')


def test_shards(remote, toy_videos, tmp_path):
  source = _open(toy_videos)
  for output in (str(tmp_path), remote):
    prepare(source, output, None, shard_size=10, num_workers=0)
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == sorted(map(os.path.basename, storage.list_files(remote)))
  for name in names:
    assert storage.read(f'{remote}/{name}') == (tmp_path / name).read_bytes()
  expected = list(_open(tmp_path))
  assert list(_open(remote)) == expected
  assert list(_open(f'{remote}/*.array_record')) == expected
  middle = f'{remote}/videos-00001-of-00003.array_record'
  assert list(_open(middle)) == expected[10:20]
  # A run goes on with what is missing.
  fsspec.filesystem(remote.partition(':')[0]).rm(middle)
  before = storage.read(f'{remote}/bad_files.jsonl')
  prepare(source, remote, None, shard_size=10, num_workers=0)
  assert list(_open(remote)) == expected
  assert storage.read(f'{remote}/bad_files.jsonl') == before
  # One damaged byte is one damaged record; a file of another form is none.
  shard = f'{remote}/videos-00002-of-00003.array_record'
  content = storage.read(shard)
  at = content.index(expected[21].video[:99])
  storage.replace(shard, content[: at - 60] + bytes(60) + content[at:])
  found = _open(remote)
  assert found[20] == expected[20] and found[23] == expected[23]
  with pytest.raises(decode.DecodeError, match='record is damaged') as error:
    found[21]
  assert error.value.name == 'videos-00002-of-00003.array_record[1]'
  for damaged in (content[:-9], content[: 1 << 16], bytes(1 << 17), b''):
    storage.replace(shard, damaged)
    with pytest.raises(ValueError, match='00002-of.* is damaged, or no shard'):
      _open(remote)
  with pytest.raises(ValueError, match='begun with other options'):
    prepare(source, remote, None, shard_size=9, num_workers=0)
