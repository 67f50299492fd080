"""The frame table of the header, against what the packets say."""

import io

import av
import numpy as np
import pytest
from variants import VARIANTS, write_video

from vjepa_jax.data import decode, mp4

_NOT_PLAIN = ('fragmented.mp4', 'turned.mp4')
_PLAIN = [
  n for n in VARIANTS if n.endswith(('.mp4', '.mov')) and n not in _NOT_PLAIN
]


def _open(source):
  file = io.BytesIO(source) if isinstance(source, bytes) else source
  container = av.open(file)
  stream = container.streams.video[0]
  return container, stream, next(container.demux(stream))


def _read(source):
  container, stream, first = _open(source)
  with container:
    return mp4.read_frame_table(source, stream, first)


def _read_packets(path):
  with av.open(path) as container:
    packets = [p for p in container.demux(video=0) if p.size]
  return [p.pts for p in packets], [p.is_keyframe for p in packets]


@pytest.mark.parametrize('name', _PLAIN)
@pytest.mark.parametrize('as_bytes', [False, True])
def test_equals_what_the_packets_say(videos, name, as_bytes):
  path = videos(name)
  table = _read(path.read_bytes() if as_bytes else str(path))
  pts, is_key = _read_packets(str(path))
  np.testing.assert_array_equal(table.pts, pts)
  # libav also marks frames of an open group of pictures, which no table lists.
  assert (table.is_key <= np.array(is_key)).all()
  assert table.is_key[0]


@pytest.mark.parametrize('name', ['short_gop.mp4', 'varied.mp4', 'mjpeg.mov'])
def test_opening_by_header_and_by_packets_gives_the_same(
  videos, name, monkeypatch
):
  path = str(videos(name))
  arguments = [1, 7, 22], (3, 5, 60, 70), (32, 48)
  with decode.open_video(path) as video:
    times, clip = video.times, video.read(*arguments)
  monkeypatch.setattr(mp4, 'read_frame_table', lambda *_: None)
  with decode.open_video(path) as video:
    np.testing.assert_array_equal(video.times, times)
    np.testing.assert_array_equal(video.read(*arguments), clip)


@pytest.mark.parametrize('degrees', [90, 180])
def test_leaves_turned_videos_to_the_packets(tmp_path, degrees):
  path = tmp_path / 'turned.mp4'
  write_video(path, num_frames=4, rotation=degrees)
  assert _read(str(path)) is None


def test_leaves_fragments_and_missing_data_to_the_packets(videos):
  assert _read(str(videos('fragmented.mp4'))) is None
  content = videos('faststart.mp4').read_bytes()
  assert _read(content) is not None
  assert _read(content[:-10]) is None


def test_leaves_damaged_headers_to_the_packets(videos):
  content = videos('short_gop.mp4').read_bytes()
  container, stream, first = _open(content)
  start = content.index(b'moov') - 4
  right = _read(content).pts
  rng = np.random.default_rng(0)
  with container:
    for position in range(start, len(content), 3):
      damaged = bytearray(content)
      damaged[position] = rng.integers(256)
      # libav's own table stays right: only what is read here is damaged.
      table = mp4.read_frame_table(bytes(damaged), stream, first)
      assert table is None or len(table.pts) == len(right)
    for kept in range(start, len(content), 40):
      assert mp4.read_frame_table(content[:kept], stream, first) is None
