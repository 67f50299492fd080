"""The local cache of remote videos."""

import os

import pytest

from vjepa_jax.data import cache, decode, sources, storage
from vjepa_jax.errors import UserError

SIZE = 4096  # of the whole cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv('VJEPA_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('VJEPA_CACHE_GIB', str(SIZE / 2**30))
  cache.open_cache.cache_clear()
  yield tmp_path / 'cache'
  cache.open_cache.cache_clear()


def _measure(folder):
  return sum(file.stat().st_size for file in folder.iterdir())


def test_a_remote_video_is_fetched_once(folder, toy_videos, monkeypatch):
  monkeypatch.setenv('VJEPA_CACHE_GIB', '1')
  path = 'memory://cache/video.mp4'
  content = (toy_videos.parent / '0001.mp4').read_bytes()
  storage.replace(path, content)
  fetched = []
  read = storage.read
  monkeypatch.setattr(storage, 'read', lambda p: fetched.append(p) or read(p))
  for _ in range(2):
    with decode.open_video(path) as video:
      assert video.num_frames == 24
  assert fetched == [path]
  # What the cache has may be removed at any time.
  (file,) = folder.iterdir()
  assert file.read_bytes() == content
  file.unlink()
  with decode.open_video(path) as video:
    assert video.num_frames == 24
  assert fetched == [path, path]


def test_its_size_is_bounded_and_the_oldest_go(folder):
  own, other = (cache.Cache(str(folder), SIZE) for _ in range(2))
  for i in range(40):
    (own, other)[i % 2].put(f'gs://{i}', bytes([i]) * 200)
    own.get('gs://0')  # is used all the time
    for age, file in enumerate(sorted(folder.iterdir(), key=os.path.getmtime)):
      os.utime(file, (age, age))
    assert _measure(folder) <= SIZE
  assert own.get('gs://39') == bytes([39]) * 200
  assert own.get('gs://0') and not own.get('gs://1')
  assert _measure(folder) > SIZE / 2
  own.put('gs://large', bytes(SIZE // 2))
  assert own.get('gs://large') is None


def test_a_full_disk_ends_nothing(folder, monkeypatch, caplog):
  own = cache.Cache(str(folder), SIZE)

  def fail(*_):
    raise OSError('No space left on device')

  monkeypatch.setattr(os, 'fsync', fail)
  own.put('gs://bucket/video.mp4', b'video')
  assert own.get('gs://bucket/video.mp4') is None
  assert 'not kept in' in caplog.text and 'No space left' in caplog.text


@pytest.mark.parametrize('size', ['0', 'nan', 'much'])
def test_a_mistake_is_found_when_data_is_opened(folder, monkeypatch, size):
  monkeypatch.setenv('VJEPA_CACHE_GIB', size)
  with pytest.raises(UserError, match=f'VJEPA_CACHE_GIB={size}: '):
    sources.open_source('memory://bucket/videos')
