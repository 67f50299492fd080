"""Small synthetic videos, encoded once a session, and shards."""

from collections.abc import Sequence
import fractions
import io
import pathlib

from array_record.python import array_record_module
import av
import cv2
import numpy as np


def make_frames(num_frames: int, height: int, width: int) -> np.ndarray:
  """Makes a moving texture, uint8 [N, H, W, 3]; no two frames are equal."""
  rng = np.random.default_rng(0)
  luma = rng.integers(40, 216, (12, 16, 1))
  coarse = (luma + rng.integers(-40, 40, (12, 16, 3))).astype(np.uint8)
  texture = cv2.resize(
    coarse, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC
  )
  frames = []
  for i in range(num_frames):
    frame = np.roll(texture, (2 * i, 3 * i), (0, 1))[:height, :width].copy()
    frame[:8, :8] = 2 * i % 256
    frames.append(frame)
  return np.stack(frames)


def write_video(
  path: pathlib.Path,
  *,
  codec: str = 'libx264',
  num_frames: int = 60,
  size: tuple[int, int] = (96, 128),
  pix_fmt: str = 'yuv420p',
  options: dict[str, str] | None = None,
  container_options: dict[str, str] | None = None,
  rotation: int = 0,
  times: list[int] | None = None,
  tags: tuple[int, int] | None = None,
  packed: bool = False,
) -> pathlib.Path:
  """Encodes `make_frames` at 30 frames per second, or at `times` in ms."""
  height, width = size
  with av.open(path, 'w', options=container_options or {}) as container:
    stream = container.add_stream(codec, rate=30)
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.codec_context.thread_count = 1
    stream.options = options or {}
    if times is not None:
      stream.codec_context.time_base = fractions.Fraction(1, 1000)
    if tags:
      stream.codec_context.colorspace, stream.codec_context.color_range = tags
    if rotation:
      stream.set_display_rotation(rotation)
    for i, pixels in enumerate(make_frames(num_frames, height, width)):
      frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
      if times is not None:
        frame.pts, frame.time_base = times[i], stream.codec_context.time_base
      if tags:
        frame = frame.reformat(
          format=pix_fmt, dst_colorspace=tags[0], dst_color_range=tags[1]
        )
        frame.colorspace, frame.color_range = tags
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  if packed:
    _pack_b_pictures(path)
  return path


def write_shard(path: pathlib.Path, records: Sequence[bytes]) -> None:
  """Writes an ArrayRecord shard."""
  writer = array_record_module.ArrayRecordWriter(
    str(path), 'group_size:1,uncompressed'
  )
  for record in records:
    writer.write(record)
  writer.close()


def _pack_b_pictures(path: pathlib.Path) -> None:
  """Moves B pictures into the packet before theirs, as DivX did in AVI."""
  start, b_picture = b'\0\0\x01\xb6', 0b10 << 6
  mark, placeholder = b'\0\0\x01\xb2DivX503b1393p', start + b'\x50\x4f'
  source = io.BytesIO(path.read_bytes())
  with av.open(source) as old, av.open(path, 'w') as new:
    stream = new.add_stream_from_template(old.streams.video[0])
    packets = [p for p in old.demux(video=0) if p.size]
    contents = [bytes(p) for p in packets]
    contents[0] = contents[0].replace(start, mark + start)
    is_b = [c[:4] == start and c[4] & 0xC0 == b_picture for c in contents]
    for i, (next_is_b, following) in enumerate(
      zip([*is_b[1:], False], [*contents[1:], b''], strict=True)
    ):
      content = b'' if is_b[i] else contents[i]
      content += following if next_is_b else b''
      packet = av.Packet(content or placeholder)
      packet.stream, packet.time_base = stream, stream.time_base
      packet.pts = packet.dts = i
      packet.is_keyframe = packets[i].is_keyframe
      new.mux(packet)


_VARIED_MS = [int(i * 33 + 200 * np.sin(i / 9)) for i in range(60)]
_X264 = {'preset': 'veryfast'}
VARIANTS = {
  'short_gop.mp4': dict(options=_X264 | {'g': '12', 'bf': '3'}),
  'long_gop.mp4': dict(options=_X264 | {'g': '250', 'bf': '3'}),
  'open_gop.mp4': dict(
    options=_X264 | {'g': '12', 'bf': '3', 'x264-params': 'open-gop=1'}
  ),
  'fast.mp4': dict(options={'g': '8', 'tune': 'fastdecode'}),
  'faststart.mp4': dict(
    options=_X264, container_options={'movflags': 'faststart'}
  ),
  'fragmented.mp4': dict(
    options=_X264 | {'g': '12'},
    container_options={'movflags': 'frag_keyframe+empty_moov'},
  ),
  'odd.mkv': dict(
    size=(75, 101), pix_fmt='yuv444p', options=_X264 | {'g': '12'}
  ),
  'odd.webm': dict(
    codec='libvpx-vp9',
    size=(75, 101),
    options={'deadline': 'realtime', 'cpu-used': '8', 'g': '12'},
  ),
  'hidden.webm': dict(
    codec='libvpx',
    options={'auto-alt-ref': '1', 'lag-in-frames': '16', 'cpu-used': '8'},
  ),
  'h264.mkv': dict(options=_X264 | {'g': '12', 'bf': '3'}),
  'h264.avi': dict(options=_X264 | {'g': '12', 'bf': '3'}),
  'h264.ts': dict(options=_X264 | {'g': '12', 'bf': '3'}),
  'hevc.mp4': dict(
    codec='libx265',
    options={
      'preset': 'ultrafast',
      'x265-params': 'keyint=12:bframes=3:log-level=none:pools=1',
    },
  ),
  'mpeg4.avi': dict(codec='mpeg4', options={'g': '12'}),
  'mpeg4_b.avi': dict(codec='mpeg4', options={'g': '12', 'bf': '2'}),
  'packed.avi': dict(
    codec='mpeg4', options={'g': '12', 'bf': '2'}, packed=True
  ),
  'mpeg2.ts': dict(codec='mpeg2video', options={'g': '12', 'bf': '2'}),
  'mpeg2.mpg': dict(codec='mpeg2video', options={'g': '12', 'bf': '2'}),
  'av1.mp4': dict(codec='libsvtav1', options={'preset': '12', 'g': '20'}),
  'ten_bit.mp4': dict(
    codec='libx265',
    pix_fmt='yuv420p10le',
    options={
      'preset': 'ultrafast',
      'x265-params': 'keyint=12:log-level=none:pools=1',
    },
  ),
  'mjpeg.mov': dict(codec='mjpeg', pix_fmt='yuvj420p'),
  'picture.gif': dict(codec='gif', pix_fmt='rgb8', num_frames=20),
  'varied.mp4': dict(options=_X264 | {'g': '12'}, times=_VARIED_MS),
  'bt709.mp4': dict(options=_X264, tags=(1, 1)),
  'full_range.mp4': dict(options=_X264, tags=(5, 2)),
  'turned.mp4': dict(options=_X264, rotation=90),
}
