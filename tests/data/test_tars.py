"""Tar files of WebDataset."""

import errno
import io
import pickle
import tarfile

import cloudpickle
import pytest

from vjepa_jax.data import tars
from vjepa_jax.data.records import Record
from vjepa_jax.data.video import DecodeError

_EXTENSIONS = frozenset(['.mp4', '.jpg'])


def _write(path, members, mode='w'):
  with tarfile.open(path, mode) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      info.mtime = 1.5  # WebDataset writes fractions, in a header of their own
      tar.addfile(info, io.BytesIO(content))
  return str(path)


def test_reads_members_at_random(tmp_path):
  long = 'deep/' * 60 + 'name'
  first = _write(
    tmp_path / 'a-000.tar',
    [
      ('x/0.mp4', b'zero'),
      ('x/0.cls', b'7\n'),
      ('x/0.json', b'{}'),
      ('x/1.cls', b'3'),
      ('x/1.seg.mp4', b'one'),
      ('y/1.txt', b'no video'),
      ('y/1.MP4', b'other'),
    ],
  )
  second = _write(tmp_path / 'a-001.tar', [(f'{long}.jpg', b'\xff' * 2000)])
  records = tars.TarSource([first, second], _EXTENSIONS)
  expected = [
    Record(b'zero', 7, 'a-000.tar/x/0.mp4'),
    Record(b'one', 3, 'a-000.tar/x/1.seg.mp4'),
    Record(b'other', -1, 'a-000.tar/y/1.MP4'),
    Record(b'\xff' * 2000, -1, f'a-001.tar/{long}.jpg'),
  ]
  copy = pickle.loads(cloudpickle.dumps(records))
  assert [copy[i] for i in (3, 1, 0, 2, -1)] == [
    expected[i] for i in (3, 1, 0, 2, 3)
  ]
  assert list(records) == expected
  with pytest.raises(IndexError):
    records[4]
  assert repr(records).endswith("a-000.tar', 4 videos)")
  assert copy.hash_names() == records.hash_names()
  one = tars.TarSource([first], _EXTENSIONS)
  assert one.hash_names() != records.hash_names()


def test_says_what_is_wrong_with_a_tar(tmp_path):
  members = [('0.mp4', b'v' * 3000), ('1.mp4', b'w' * 3000)]
  whole = tmp_path / 'whole.tar'
  path = _write(whole, members)
  records = tars.TarSource([path], _EXTENSIONS)
  whole.write_bytes(whole.read_bytes()[:5000])
  assert records[0].video == b'v' * 3000
  with pytest.raises(DecodeError, match='cut off') as error:
    records[1]
  assert error.value.name == 'whole.tar/1.mp4'
  with pytest.raises(ValueError, match=r'cannot read .*whole\.tar'):
    tars.TarSource([path], _EXTENSIONS)
  whole.unlink()
  with pytest.raises(DecodeError, match='is gone'):
    records[0]
  for name, content, mode in (
    ('words.tar', [('0.mp4', b'v'), ('0.cls', b'cat')], 'w'),
    ('packed.tar', members, 'w:gz'),
    ('bare.tar', [('0.txt', b'')], 'w'),
  ):
    path = _write(tmp_path / name, content, mode)
    with pytest.raises(ValueError, match=name):
      tars.TarSource([path], _EXTENSIONS)


def test_a_disk_that_fails_is_no_mistake_of_the_user(tmp_path, monkeypatch):
  path = _write(tmp_path / 'whole.tar', [('0.mp4', b'v')])

  def fail(*_):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(tars.tarfile, 'open', fail)
  with pytest.raises(OSError, match='Input'):
    tars.TarSource([path], _EXTENSIONS)
