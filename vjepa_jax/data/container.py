"""An open file of encoded video: its packets and its decoder."""

from collections.abc import Iterator, Sequence
import io
import time

import av

from vjepa_jax.data.video import DecodeError, Limits

# A Python log callback (av.logging.set_level) takes the GIL from libav's own
# threads and can deadlock when a decoder is freed, so only libav's level is
# touched here.
av.logging.set_libav_level(av.logging.PANIC)

# What is left out accepts nearly any text, opens sockets, or opens other files
# that a file names; images are not opened by libav.
_FORMATS = av.formats_available - {
  'concat', 'dash', 'hls', 'image2', 'lavfi', 'lrc', 'rtp', 'rtsp', 'sap',
  'sdp', 'tty', 'vobsub', 'webm_dash_manifest',
}  # fmt: skip
_SAFE = {
  'format_whitelist': ','.join(sorted(_FORMATS)),
  'protocol_whitelist': 'file',
}
# Beyond it, a handful of frames fills the memory: 16384 x 8192.
_MAX_PIXELS = 1 << 27
# Containers that describe their streams in the header; in others libav decodes
# packets to find out.
_COMPLETE_HEADERS = {'mp4': (4, b'ftyp'), 'matroska': (0, b'\x1a\x45\xdf\xa3')}
_TRUST_HEADER = {'skip_frame': 'all', 'probesize': '32'}


class Container:
  """A container and the decoder of its first video stream.

  Attributes:
    source: Path of a local file, or its bytes.
    format: Names of its format.
    stream: The video stream.
    codec: Its decoder.
    damaged: Whether an error may have swallowed packets or frames since the
      last call of `demux`.
    display_times: For containers that only have decoding times: from those to
      the timestamps that `demux` gives to packets; None to take theirs.
  """

  def __init__(self, source: str | bytes, limits: Limits) -> None:
    """Remembers `source`; `open` opens it."""
    self.source = source
    self.damaged = False
    self.display_times = None
    self._container = None
    self.max_seconds = limits.seconds
    self.start_clock()

  @property
  def seconds(self) -> float | None:
    """Duration that the header promises."""
    duration = self._container.duration
    return duration / av.time_base if duration else None

  def start_clock(self) -> None:
    """Gives what follows in this thread its time, see `Limits.seconds`."""
    self._start = time.thread_time()

  def open(self) -> None:
    """Opens the file at its start, again if it is open, and a new decoder.

    Raises:
      DecodeError: It is not a video.
    """
    self.close()
    source = self.source
    # With the protocol spelled out, a colon in a file name is just a colon.
    file = f'file:{source}' if isinstance(source, str) else io.BytesIO(source)
    trust = _TRUST_HEADER if _has_complete_header(source) else {}
    try:
      self._container = av.open(
        file, metadata_errors='replace', options=_SAFE | trust
      )
    except av.ArgumentError as e:
      raise DecodeError('not a video: text, or a list of other files') from e
    self.format = self._container.format.name
    streams = [
      s
      for s in self._container.streams.video
      if not s.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
      raise DecodeError('no video stream')
    self.stream = streams[0]
    self.codec = self.stream.codec_context
    if self.codec is None:
      raise DecodeError('no decoder for the codec of the video stream')
    if self.codec.width * self.codec.height > _MAX_PIXELS:
      raise DecodeError(
        f'frames of {self.codec.width}x{self.codec.height} pixels are too large'
      )
    # For sizes that change in the middle.
    self.codec.options = {'max_pixels': str(_MAX_PIXELS)}
    self.codec.skip_frame = 'DEFAULT'
    # One thread a decoder is faster in total than frame threads, and the only
    # setting that exactness was checked with.
    self.codec.thread_count = 1

  def close(self) -> None:
    """Closes the file, if it is open."""
    if self._container is not None:
      self._container.close()
      self._container = None

  def seek(self, pts: int) -> None:
    """Goes to the keyframe at or before a timestamp."""
    self._container.seek(pts, stream=self.stream)

  def demux(self, all_streams: bool = False) -> Iterator[av.Packet]:
    """Yields the non-empty packets from where the file stands.

    An error of the container sets `damaged` and ends the packets: those before
    it may still be all that is wanted.
    """
    self.damaged = False
    streams = self._container.streams if all_streams else [self.stream]
    packets = self._container.demux(*streams)
    while True:
      try:
        packet = next(packets)
      except StopIteration:
        return
      except av.FFmpegError:
        self.damaged = True
        return
      except IndexError:
        # PyAV trips over streams that first appear in the middle of a file;
        # they are not ours.
        packets = self._container.demux(*streams)
        continue
      if time.thread_time() - self._start > self.max_seconds:
        raise DecodeError(
          f'takes more than {self.max_seconds:g} s of computing'
        )
      if packet.size:
        if self.display_times is not None:
          packet.pts = self.display_times.get(packet.dts)
        yield packet

  def send(self, packet: av.Packet | None) -> Sequence[av.VideoFrame]:
    """Decodes one packet, None for what is left; an error sets `damaged`."""
    try:
      return self.codec.decode(packet)
    except av.FFmpegError:
      self.damaged = True
      return []

  def decode(self) -> Iterator[av.VideoFrame]:
    """Yields all frames in presentation order from where the file stands."""
    self.codec.skip_frame = 'DEFAULT'
    for packet in self.demux():
      yield from self.send(packet)
    yield from self.send(None)


def _has_complete_header(source: str | bytes) -> bool:
  """Tells by the first bytes whether the container describes its streams."""
  if isinstance(source, bytes):
    start = source[:8]
  else:
    with open(source, 'rb') as f:
      start = f.read(8)
  return any(start[at:].startswith(m) for at, m in _COMPLETE_HEADERS.values())
