"""Reads the frames of a clip out of an encoded video, and nothing else.

A video is indexed once, without decoding: from the header of an MP4 file, else
from its packets. A clip is then read by seeking to the keyframe before its
first frame and decoding what its frames need; only the pixels inside the crop
are ever resized and converted to RGB.

Wherever the container lies about its timestamps or cannot be seeked, the clip
is decoded from the start of the file instead, so what comes back is the frame
a sequential decode would have given. Whatever is wrong with a single file ends
as a `DecodeError` with a one-line reason, which a loader can turn into another
clip.
"""

from collections.abc import Iterator, Sequence
import io
import os

import av
import cv2
import numpy as np

from vjepa_jax.data import mp4, pixels
from vjepa_jax.data.pixels import Box
from vjepa_jax.data.video import (
  CLOCK_SLACK,
  ArrayVideo,
  DecodeError,
  Video,
  describe_error,
)

# A Python log callback (av.logging.set_level) takes the GIL from libav's own
# threads and can deadlock when a decoder is freed, so only libav's level is
# touched here.
av.logging.set_libav_level(av.logging.PANIC)

# Decoders whose output is bit-identical when unwanted non-reference frames are
# skipped. AV1 is not among them: dav1d drops wanted frames.
_EXACT_WHEN_SKIPPING = frozenset(['h264', 'hevc', 'mpeg4', 'vp8', 'vp9'])
# Text-art and playlist demuxers accept nearly anything, and a playlist could
# open other files.
_NOT_VIDEO_FORMATS = frozenset(['tty', 'concat', 'hls', 'sdp', 'dash', 'lrc'])
# Containers that describe their streams in the header; in others libav decodes
# packets to find out.
_COMPLETE_HEADERS = {'mp4': (4, b'ftyp'), 'matroska': (0, b'\x1a\x45\xdf\xa3')}
_TRUST_HEADER = {'skip_frame': 'all', 'probesize': '32'}
# A packet may legally produce no picture (a hidden reference, a leading frame
# of an open GOP). The picture on screen at that time stands in for it, but only
# over a gap shorter than this.
_MAX_GAP_SECONDS = 0.2
# How much shorter than the header's duration a Matroska file may be.
_DURATION_SLACK_SECONDS = 1.0
_DURATION_SLACK_FRACTION = 0.05


def open_video(video: str | bytes | np.ndarray) -> Video:
  """Opens a video for reading clips; use it as a context manager.

  Args:
    video: path of a file (a path with a scheme, such as `gs://`, is read
      through `etils.epath`), the bytes of an encoded file, or ready frames as
      uint8 [N, H, W, 3], which are taken to be `ARRAY_FPS` frames per second.

  Returns:
    The open video.

  Raises:
    DecodeError: if the file is missing, empty, truncated or not a video. That
      no frame of it decodes may show only when one is read.
  """
  if isinstance(video, np.ndarray):
    return ArrayVideo(video)
  if isinstance(video, str | os.PathLike):
    return EncodedVideo(_check_file(os.fspath(video)))
  if isinstance(video, bytes | bytearray | memoryview):
    if not len(video):
      raise DecodeError('empty file')
    return EncodedVideo(bytes(video))
  raise TypeError(
    f'video must be a path, bytes or a uint8 array, got {type(video)}'
  )


class EncodedVideo(Video):
  """A video decoded on demand; see `open_video`."""

  def __init__(self, source: str | bytes) -> None:
    """Opens and indexes `source`, a local path or the bytes of a file."""
    self._source = source
    self._container = None
    try:
      self._reopen()
      if not self._index_header():
        self._index_packets()
    except (av.FFmpegError, OSError, cv2.error) as e:
      self.close()
      raise DecodeError(describe_error(e)) from e
    except DecodeError:
      self.close()
      raise
    height, width = self._coded_size
    if self._quarter_turns % 2:
      height, width = width, height
    seconds = self._pts - self._pts[0]
    times = seconds * float(self._stream.time_base)
    if len(times) > 1:
      fps = (len(times) - 1) / times[-1]
    else:
      fps = float(self._stream.average_rate or 1)
    super().__init__(times, height, width, fps)

  def close(self) -> None:
    if self._container is not None:
      self._container.close()
      self._container = None

  def play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
    try:
      yield from self._play(times)
    except (av.FFmpegError, OSError, cv2.error) as e:
      raise DecodeError(describe_error(e)) from e

  def _play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
    self._reopen()
    box, size = (0, 0, self.height, self.width), (self.height, self.width)
    remaining = iter(times)
    time = next(remaining, None)
    shown, shown_time = None, 0.0
    for number, frame in enumerate(self._decode_good()):
      if self._by_ordinal:
        frame_time = self.times[min(number, self.num_frames - 1)]
      else:
        ticks = frame.pts - int(self._pts[0])
        frame_time = ticks * float(self._stream.time_base)
      shown = shown or frame
      while time is not None and time + CLOCK_SLACK < frame_time:
        self._check_hole(time, shown_time)
        yield self._convert(shown, box, size)
        time = next(remaining, None)
      if time is None:
        return
      shown, shown_time = frame, frame_time
    if shown is None:
      raise DecodeError('no frame decodes')
    while time is not None:
      self._check_hole(time, shown_time)
      yield self._convert(shown, box, size)
      time = next(remaining, None)

  def _decode_good(self) -> Iterator[av.VideoFrame]:
    """Yields the frames that can be shown; others set `_damaged`."""
    for frame in self._decode():
      if frame.is_corrupt or (frame.pts is None and not self._by_ordinal):
        self._damaged = True
      else:
        yield frame

  def _check_hole(self, time: float, shown_time: float) -> None:
    """Raises DecodeError if frames are missing between two times in seconds.

    A picture may stay on screen for long; it may not stand in for later ones
    that the index knows of.
    """
    latest = np.searchsorted(self.times, time - _MAX_GAP_SECONDS, 'right') - 1
    if latest >= 0 and self.times[latest] > shown_time + CLOCK_SLACK:
      raise DecodeError(
        f'no frame decodes from {shown_time:.3f} to {time:.3f} s'
      )

  def _reopen(self) -> None:
    """Opens the file at its start and sets up the decoder."""
    self.close()
    source = self._source
    # With the protocol spelled out, a colon in a file name is just a colon.
    file = f'file:{source}' if isinstance(source, str) else io.BytesIO(source)
    self._container = av.open(
      file,
      metadata_errors='replace',
      options=_TRUST_HEADER if _has_complete_header(source) else {},
    )
    if self._container.format.name in _NOT_VIDEO_FORMATS:
      raise DecodeError(f'not a video: {self._container.format.long_name}')
    streams = [
      s
      for s in self._container.streams.video
      if not s.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
      raise DecodeError('no video stream')
    self._stream = streams[0]
    if self._stream.codec_context is None:
      raise DecodeError('no decoder for the codec of the video stream')
    self._stream.codec_context.skip_frame = 'DEFAULT'
    # One thread a decoder is faster in total than frame threads, and the only
    # setting that exactness was checked with.
    self._stream.codec_context.thread_count = 1

  def _index_header(self) -> bool:
    """Takes timestamps and size from the header of a plain MP4 file.

    Nothing is read or decoded then but what a clip needs. Sets what
    `_index_packets` sets.

    Returns:
      Whether the file is that plain; if not, it stands at its start again.
    """
    codec = self._stream.codec_context
    if 'mp4' not in self._container.format.name or codec.name == 'vp8':
      return False
    first = next(self._demux([self._stream]), None)
    if first is not None and codec.height and codec.width:
      table = mp4.read_frame_table(self._source, self._stream, first)
      if table is not None:
        self._pts = np.unique(table.pts)
        self._key_pts = np.unique(table.pts[table.is_key])
        self._by_ordinal = False
        self._coded_size, self._quarter_turns = (codec.height, codec.width), 0
        return True
    self._reopen()
    return False

  def _index_packets(self) -> None:
    """Lists the frames' timestamps, from the packets where they can be trusted.

    Sets `_pts`, int64 [N] in units of the stream's time base; `_key_pts`, those
    that can be seeked to; `_by_ordinal`, whether frames are identified by their
    number from the start because timestamps do not do; `_coded_size` and
    `_quarter_turns`, how frames are stored, which only a frame tells.
    """
    is_matroska = 'matroska' in self._container.format.name
    streams = self._container.streams if is_matroska else [self._stream]
    is_vp8 = self._stream.codec_context.name == 'vp8'
    # AVI has no presentation times, and libav's guesses depend on where
    # decoding started.
    is_guessed = self._container.format.name == 'avi' and bool(
      self._stream.codec_context.has_b_frames
    )
    pts, keys, num_packets, end, first = [], [], 0, 0.0, None
    for packet in self._demux(streams):
      if is_matroska and packet.pts is not None:
        ticks = packet.pts + (packet.duration or 0)
        end = max(end, float(ticks * packet.time_base))
      if packet.stream_index != self._stream.index:
        continue
      if not num_packets:
        first = self._decode_alone(packet)
      num_packets += not packet.is_corrupt
      if packet.is_discard or packet.is_corrupt:
        continue
      if is_vp8 and not bytes(packet)[0] & 0x10:
        continue  # A hidden reference (RFC 6386, section 9.1).
      if packet.pts is None:
        is_guessed = True
        continue
      pts.append(packet.pts)
      if packet.is_keyframe:
        keys.append(packet.pts)
    self._check_complete(num_packets, end)
    self._by_ordinal = is_guessed or not pts
    if self._by_ordinal:
      self._pts = self._decode_timestamps()
    else:
      self._pts = np.unique(np.asarray(pts, np.int64))
    self._key_pts = np.unique(np.asarray(keys, np.int64))
    first = first or self._decode_first()
    self._coded_size = first.height, first.width
    self._quarter_turns = round(first.rotation / 90) % 4

  def _check_complete(self, num_packets: int, end: float) -> None:
    """Raises DecodeError if the header promises more than was read.

    Only two containers promise something dependable: MP4 lists its samples and
    Matroska has the duration. Others estimate, or have audio that goes on.
    """
    name = self._container.format.name
    if 'mp4' in name:
      promised = len(self._stream.index_entries)
      if num_packets < promised:
        raise DecodeError(
          f'truncated: the header lists {promised} frames, the file has '
          f'{num_packets}'
        )
    elif 'matroska' in name and self._container.duration:
      promised = self._container.duration / av.time_base
      slack = max(_DURATION_SLACK_SECONDS, promised * _DURATION_SLACK_FRACTION)
      if end < promised - slack:
        raise DecodeError(
          f'truncated: the header says {promised:.1f} s, the file has '
          f'{end:.1f} s'
        )

  def _decode_timestamps(self) -> np.ndarray:
    """Decodes the whole video for its timestamps, int64 [N]."""
    self._reopen()
    pts = [f.pts for f in self._decode() if not f.is_corrupt]
    if not pts:
      raise DecodeError('no frame decodes')
    if None not in pts and (np.diff(pts) > 0).all():
      return np.asarray(pts, np.int64)
    stream = self._stream
    ticks = 1 / (float(stream.average_rate or 25) * float(stream.time_base))
    return np.round(np.arange(len(pts)) * max(ticks, 1)).astype(np.int64)

  def _decode_alone(self, packet: av.Packet) -> av.VideoFrame | None:
    """Decodes one packet without waiting for those after it."""
    codec = self._stream.codec_context
    try:
      frames = codec.decode(packet) + codec.decode(None)
    except av.FFmpegError:
      frames = []
    codec.flush_buffers()
    return frames[0] if frames else None

  def _decode_first(self) -> av.VideoFrame:
    """Decodes the first frame that can be."""
    self._reopen()
    for frame in self._decode():
      return frame
    raise DecodeError('no frame decodes')

  def _decode(self) -> Iterator[av.VideoFrame]:
    """Yields all frames in presentation order from where the file stands.

    A packet that fails sets `_damaged` and does not end the video.
    """
    codec = self._stream.codec_context
    codec.skip_frame = 'DEFAULT'
    for packet in self._demux([self._stream]):
      yield from self._send(packet)
    yield from self._send(None)

  def _send(self, packet: av.Packet | None) -> list[av.VideoFrame]:
    """Decodes one packet, None for what is left; an error sets `_damaged`."""
    try:
      return self._stream.codec_context.decode(packet)
    except av.FFmpegError:
      self._damaged = True
      return []

  def _decode_wanted(self, pts: list[int]) -> Iterator[av.VideoFrame]:
    """Seeks, and decodes no more than what increasing timestamps need.

    Where the codec allows it, frames that are neither wanted nor needed to
    decode others are left out, and so is what lies between the last wanted
    frame of a group of pictures and the keyframe that the next one needs.

    Args:
      pts: timestamps of the wanted frames.

    Yields:
      Frames in presentation order, the wanted ones among them.
    """
    codec = self._stream.codec_context
    may_skip = codec.name in _EXACT_WHEN_SKIPPING
    numbers = np.searchsorted(self._key_pts, pts, side='right') - 1
    keys = [
      int(self._key_pts[n]) if n >= 0 else int(self._pts[0]) for n in numbers
    ]
    unsent, position = set(pts), 0
    self._container.seek(keys[0], stream=self._stream)
    codec.skip_frame, skipping = 'DEFAULT', False
    last_key, resume_at = keys[0], None
    for packet in self._demux([self._stream]):
      if resume_at is not None and packet.pts != resume_at:
        continue
      resume_at = None
      is_wanted = packet.pts in unsent
      if may_skip and skipping == is_wanted:
        skipping = not is_wanted
        codec.skip_frame = 'NONREF' if skipping else 'DEFAULT'
      if packet.is_keyframe and packet.pts is not None:
        last_key = max(last_key, packet.pts)
      yield from self._send(packet)
      if not (may_skip and is_wanted):
        continue
      unsent.discard(packet.pts)
      while position < len(pts) and pts[position] not in unsent:
        position += 1
      if position == len(pts):
        break
      if keys[position] > last_key:
        # As after a seek: what is held back comes out, and the decoder starts
        # afresh at the keyframe.
        yield from self._send(None)
        codec.flush_buffers()
        resume_at = keys[position]
    yield from self._send(None)

  def _demux(self, streams: Sequence[av.stream.Stream]) -> Iterator[av.Packet]:
    """Yields the non-empty packets from where the file stands.

    An error of the container sets `_damaged` and ends the packets: those before
    it may still be all that is wanted.
    """
    self._damaged = False
    packets = self._container.demux(*streams)
    while True:
      try:
        packet = next(packets)
      except StopIteration:
        return
      except av.FFmpegError:
        self._damaged = True
        return
      except IndexError:
        # PyAV trips over streams that first appear in the middle of a file;
        # they are not ours.
        packets = self._container.demux(*streams)
        continue
      if packet.size:
        yield packet

  def _read_distinct(
    self, wanted: np.ndarray, box: Box, size: tuple[int, int]
  ) -> np.ndarray:
    result = np.empty((len(wanted), *size, 3), np.uint8)
    if self._by_ordinal:
      done = self._read_by_ordinal(wanted, box, size, result)
    else:
      pts = self._pts[wanted].tolist()
      done = self._read_after_seek(pts, box, size, result)
      if not done.all():
        done = self._read_from_start(pts, box, size, result)
    if not done.all():
      time = self.times[wanted[np.argmin(done)]]
      raise DecodeError(f'the frame at {time:.3f} s does not decode')
    return result

  def _read_after_seek(
    self, pts: list[int], box: Box, size: tuple[int, int], result: np.ndarray
  ) -> np.ndarray:
    """Reads increasing timestamps into `result`; returns which ones it found.

    Gives up at the first frame that should have come and did not.
    """
    done = np.zeros(len(pts), bool)
    position = 0
    try:
      for frame in self._decode_wanted(pts):
        if frame.pts is None or frame.pts > pts[position]:
          break
        if frame.pts < pts[position]:
          continue
        if frame.is_corrupt:
          break
        result[position] = self._convert(frame, box, size)
        done[position] = True
        position += 1
        if position == len(pts):
          break
    except (av.FFmpegError, OSError):
      pass  # It cannot be seeked in.
    return done

  def _read_from_start(
    self, pts: list[int], box: Box, size: tuple[int, int], result: np.ndarray
  ) -> np.ndarray:
    """As `_read_after_seek`, without seeking and skipping.

    A timestamp for which no picture exists gets the one on screen at that time,
    unless there was an error, which could have swallowed it.
    """
    self._reopen()
    done = np.zeros(len(pts), bool)
    max_gap = _MAX_GAP_SECONDS / float(self._stream.time_base)
    position, shown = 0, None

    def fill_in(frame):
      near = frame is not None and abs(frame.pts - pts[position]) <= max_gap
      if near and not self._damaged:
        result[position] = self._convert(frame, box, size)
        done[position] = True

    for frame in self._decode_good():
      while position < len(pts) and pts[position] < frame.pts:
        fill_in(shown or frame)
        position += 1
      if position < len(pts) and pts[position] == frame.pts:
        result[position] = self._convert(frame, box, size)
        done[position] = True
        position += 1
      if position == len(pts):
        return done
      shown = frame
    while position < len(pts):
      fill_in(shown)
      position += 1
    return done

  def _read_by_ordinal(
    self,
    wanted: np.ndarray,
    box: Box,
    size: tuple[int, int],
    result: np.ndarray,
  ) -> np.ndarray:
    """Reads frame numbers by counting from the start."""
    self._reopen()
    done = np.zeros(len(wanted), bool)
    good = (f for f in self._decode() if not f.is_corrupt)
    for number, frame in enumerate(good):
      position = np.searchsorted(wanted, number)
      if position == len(wanted):
        break
      if wanted[position] == number:
        result[position] = self._convert(frame, box, size)
        done[position] = True
    return done

  def _convert(
    self, frame: av.VideoFrame, box: Box, size: tuple[int, int]
  ) -> np.ndarray:
    """Crops, resizes, converts to RGB and turns upright, uint8 [h, w, 3]."""
    turns = self._quarter_turns
    box = pixels.turn_box_back(box, self._coded_size, turns)
    coded_size = size[::-1] if turns % 2 else size
    if (frame.height, frame.width) != self._coded_size:
      # The resolution changed within the stream.
      image = pixels.resize(frame.to_ndarray(format='rgb24'), self._coded_size)
      image = pixels.resize(pixels.crop(image, box), coded_size)
    elif frame.format.name in ('yuv420p', 'yuvj420p'):
      image = pixels.convert_planes(frame, box, coded_size)
    else:
      image = frame.to_ndarray(format='rgb24')
      image = pixels.resize(pixels.crop(image, box), coded_size)
    return np.rot90(image, turns) if turns else image


def _has_complete_header(source: str | bytes) -> bool:
  """Tells by the first bytes whether the container describes its streams."""
  if isinstance(source, bytes):
    start = source[:8]
  else:
    with open(source, 'rb') as f:
      start = f.read(8)
  return any(start[at:].startswith(m) for at, m in _COMPLETE_HEADERS.values())


def _check_file(path: str) -> str | bytes:
  """Returns the path of a local file, or the bytes of a remote one."""
  if '://' in path:
    # Imported late: only remote paths need it, and it imports slowly.
    from etils import epath

    try:
      content = epath.Path(path).read_bytes()
    except (OSError, ValueError, KeyError, ImportError) as e:
      # KeyError: a scheme that no file system is known for.
      raise DecodeError(describe_error(e)) from e
    if not content:
      raise DecodeError('empty file')
    return content
  try:
    if not os.path.getsize(path):
      raise DecodeError('empty file')
    if os.path.isdir(path):
      raise DecodeError('not a video: a folder')
    with open(path, 'rb'):
      pass  # Says why it cannot be read more plainly than libav does.
  except FileNotFoundError as e:
    raise DecodeError('file does not exist') from e
  except OSError as e:
    raise DecodeError(describe_error(e)) from e
  return path
