"""What opening a video finds out: its frames, without decoding them.

They are listed in the header of a plain MP4 file; else the packets are asked.
"""

import dataclasses

import av
import numpy as np

from vjepa_jax.data import h264, mp4, mpeg4
from vjepa_jax.data.container import Container
from vjepa_jax.data.video import DecodeError

# How much shorter than the header's duration a Matroska file may be.
_DURATION_SLACK_SECONDS = 1.0
_DURATION_SLACK_FRACTION = 0.05
# Who finds out when the pictures of an AVI file are shown, by codec.
_ORDERS = {'h264': h264.Order, 'mpeg4': mpeg4.Order}


@dataclasses.dataclass(frozen=True)
class FrameIndex:
  """The frames of a video.

  Attributes:
    pts: int64 `[N]`, timestamps in units of the stream's time base.
    key_pts: int64 `[K]`, those that can be seeked to.
    by_ordinal: Frames are identified by their number from the start, because
      timestamps do not do.
    coded_size: Height and width of a frame as it is stored.
    quarter_turns: From there to upright, counter-clockwise.
    is_packed: Some packets hold two pictures: none may be skipped then.
  """

  pts: np.ndarray
  key_pts: np.ndarray
  by_ordinal: bool
  coded_size: tuple[int, int]
  quarter_turns: int
  is_packed: bool = False


def index_frames(container: Container) -> FrameIndex:
  """Indexes the frames of an open container.

  Raises:
    DecodeError: The file is cut off, or no frame decodes.
  """
  return _read_header(container) or _scan_packets(container)


def _read_header(container: Container) -> FrameIndex | None:
  """Indexes a plain MP4 file by its header.

  Nothing is read or decoded then but what a clip needs.

  Returns:
    None if the file is not that plain; it stands at its start again then.
  """
  codec = container.codec
  if 'mp4' not in container.format or codec.name == 'vp8':
    return None
  first = next(container.demux(), None)
  size = codec.height, codec.width
  if first is not None and all(size):
    table = mp4.read_frame_table(container.source, container.stream, first)
    if table is not None:
      keys = np.unique(table.pts[table.is_key])
      return FrameIndex(np.unique(table.pts), keys, False, size, 0)
  container.open()
  return None


def _scan_packets(container: Container) -> FrameIndex:
  """Indexes any file by its packets, where they can be trusted."""
  is_matroska = 'matroska' in container.format
  is_vp8 = container.codec.name == 'vp8'
  # AVI has no presentation times, and libav's guesses depend on where
  # decoding started.
  is_guessed = container.format == 'avi' and bool(container.codec.has_b_frames)
  order, key_dts = None, []
  if is_guessed and container.codec.name in _ORDERS:
    order = _ORDERS[container.codec.name]()
  pts, keys, num_packets, end, first = [], [], 0, 0.0, None
  for packet in container.demux(all_streams=is_matroska):
    if is_matroska and packet.pts is not None:
      ticks = packet.pts + (packet.duration or 0)
      end = max(end, float(ticks * packet.time_base))
    if packet.stream_index != container.stream.index:
      continue
    if not num_packets:
      first = _decode_alone(container.codec, packet)
    num_packets += not packet.is_corrupt
    if packet.is_discard or packet.is_corrupt:
      continue
    if is_vp8 and not bytes(packet)[0] & 0x10:
      continue  # A hidden reference (RFC 6386, section 9.1).
    if order:
      can_start = order.add(packet.dts, bytes(packet))
      if can_start and packet.is_keyframe:
        key_dts.append(packet.dts)
    if packet.pts is None:
      is_guessed = True
      continue
    pts.append(packet.pts)
    if packet.is_keyframe:
      keys.append(packet.pts)
  _check_complete(container, num_packets, end)
  display_times = order and order.compute_times()
  if display_times:
    container.display_times = display_times
    pts = list(display_times.values())
    keys = [display_times[dts] for dts in key_dts]
    is_guessed = False
  by_ordinal = is_guessed or not pts
  if by_ordinal:
    pts = _decode_timestamps(container)
  first = first or _decode_first(container)
  return FrameIndex(
    # Frames that are counted come in their order already.
    pts=pts if by_ordinal else np.unique(np.asarray(pts, np.int64)),
    key_pts=np.unique(np.asarray(keys, np.int64)),
    by_ordinal=by_ordinal,
    coded_size=(first.height, first.width),
    quarter_turns=round(first.rotation / 90) % 4,
    is_packed=bool(order) and order.is_packed,
  )


def _check_complete(container: Container, num_packets: int, end: float) -> None:
  """Raises DecodeError if the header promises more than was read.

  Only two containers promise something dependable: MP4 lists its samples and
  Matroska has the duration. Others estimate, or have audio that goes on.
  """
  if 'mp4' in container.format:
    promised = len(container.stream.index_entries)
    if num_packets < promised:
      raise DecodeError(
        f'truncated: the header lists {promised} frames, the file has '
        f'{num_packets}'
      )
  elif 'matroska' in container.format and container.seconds:
    promised = container.seconds
    slack = max(_DURATION_SLACK_SECONDS, promised * _DURATION_SLACK_FRACTION)
    if end < promised - slack:
      raise DecodeError(
        f'truncated: the header says {promised:.1f} s, the file has {end:.1f} s'
      )


def _decode_timestamps(container: Container) -> np.ndarray:
  """Decodes the whole video for its timestamps, int64 [N]."""
  container.open()
  pts = [f.pts for f in container.decode() if not f.is_corrupt]
  if not pts:
    raise DecodeError('no frame decodes')
  if None not in pts and (np.diff(pts) > 0).all():
    return np.asarray(pts, np.int64)
  stream = container.stream
  ticks = 1 / (float(stream.average_rate or 25) * float(stream.time_base))
  return np.round(np.arange(len(pts)) * max(ticks, 1)).astype(np.int64)


def _decode_alone(
  codec: av.VideoCodecContext, packet: av.Packet
) -> av.VideoFrame | None:
  """Decodes one packet without waiting for those after it."""
  try:
    frames = codec.decode(packet) + codec.decode(None)
  except av.FFmpegError:
    frames = []
  codec.flush_buffers()
  return frames[0] if frames else None


def _decode_first(container: Container) -> av.VideoFrame:
  """Decodes the first frame that can be."""
  container.open()
  for frame in container.decode():
    return frame
  raise DecodeError('no frame decodes')
