"""The timestamps of an MP4 or MOV file's frames, from its header alone.

libav lists the samples with their decoding times, but the offsets from those to
presentation times only come with the packets: to learn them a whole file would
have to be read. They are a small table in the header (ISO/IEC 14496-12, section
8.6.1.3), which is read here where everything about the file is plain; None
stands for all that is not, and means to ask the packets.
"""

from collections.abc import Iterator
import io
import re
import struct
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.video import DecodeError

_MAX_HEADER_BYTES = 1 << 28
# The tables that libav takes numbers of samples from, and how many of them the
# most compressed audio has; video has fewer than bytes.
_COUNTS = re.compile(rb'stsz|stz2|trun')
_MAX_SAMPLES_PER_BYTE = 16
# No turning, mirroring or scaling, as it is stored (section 8.3.2).
_UPRIGHT = struct.pack(
  '>9i', 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30
)  # fmt: skip


class FrameTable(NamedTuple):
  """The frames of a video stream, in decoding order.

  Attributes:
    pts: int64 `[N]`, presentation times in units of the stream's time base.
    is_key: bool `[N]`, whether decoding can start there.
  """

  pts: np.ndarray
  is_key: np.ndarray


def read_frame_table(
  source: str | bytes, stream: av.VideoStream, first: av.Packet
) -> FrameTable | None:
  """Reads the frame table of the only video track of a file.

  Args:
    source: path of a local file, or its bytes.
    stream: the stream that libav sees in it.
    first: the first packet of the stream, against which the table is checked.

  Returns:
    The table, or None if the file has fragments, an edit list that hides
    frames, several video tracks, a display matrix, missing data or anything
    unexpected.
  """
  entries = [
    (e.timestamp, e.is_keyframe, e.is_discard, e.pos, e.size)
    for e in stream.index_entries
  ]
  if not entries or first.pts is None:
    return None
  times, is_key, is_discard, starts, sizes = np.array(entries, np.int64).T
  with _open(source) as file:
    file_size = file.seek(0, io.SEEK_END)
    if (
      is_discard.any() or not sizes.all() or file_size < (starts + sizes).max()
    ):
      return None
    try:
      offsets = _read_offsets(file, file_size, len(entries))
    except (struct.error, ValueError):
      return None
  if offsets is None:
    return None
  pts = times + offsets
  if pts[0] != first.pts or times[0] != first.dts:
    return None
  return FrameTable(pts, is_key.astype(bool))


def _read_offsets(
  file: BinaryIO, file_size: int, num_frames: int
) -> np.ndarray | None:
  """Reads presentation minus decoding time of each frame, int64 `[N]`."""
  header = _read_header(file, file_size)
  if header is None or _find(header, b'mvex') is not None:
    return None
  tracks = [
    content
    for kind, content in _walk(header)
    if kind == b'trak' and _get_handler(content) == b'vide'
  ]
  if len(tracks) != 1:
    return None
  (track,) = tracks
  description = _find(track, b'tkhd')
  table = _find(track, b'mdia', b'minf', b'stbl')
  if description is None or table is None:
    return None
  # The matrix comes before width and height, which end the box.
  if description[-44:-8] != _UPRIGHT:
    return None
  runs = _find(table, b'ctts')
  if runs is None:
    return np.zeros(num_frames, np.int64)
  (num_runs,) = struct.unpack_from('>I', runs, 4)
  runs = np.frombuffer(runs, '>i4', 2 * num_runs, 8).reshape(-1, 2)
  counts = runs[:, 0].astype(np.int64)
  if (counts < 0).any() or counts.sum() != num_frames:
    return None
  return np.repeat(runs[:, 1].astype(np.int64), counts)


def check_counts(source: str | bytes) -> None:
  """Refuses a file whose header lists far more samples than it has bytes.

  libav makes an entry of its index of each at once, so that a header of some kB
  could fill the memory.

  Args:
    source: path of a local file of any kind, or its bytes.

  Raises:
    DecodeError: it is such a file.
  """
  count = 0
  with _open(source) as file:
    file_size = file.seek(0, io.SEEK_END)
    for kind, start, size in _walk_file(file, file_size):
      if kind in (b'moov', b'moof'):
        file.seek(start)
        # As large as can be indexed in reasonable time.
        count += _count_samples(file.read(min(size, _MAX_HEADER_BYTES)))
      if count > _MAX_SAMPLES_PER_BYTE * file_size:
        raise DecodeError(
          f'the header lists {count} frames or samples in {file_size} bytes'
        )


def _count_samples(header: bytes) -> int:
  """Counts what all tables of samples say they list, wherever they are."""
  count = 0
  for match in _COUNTS.finditer(header):
    at = match.end() + (4 if match[0] == b'trun' else 8)
    count += int.from_bytes(header[at : at + 4])
  return count


def _open(source: str | bytes) -> BinaryIO:
  if isinstance(source, bytes):
    return io.BytesIO(source)
  return storage.open_file(source)


def _read_header(file: BinaryIO, file_size: int) -> memoryview | None:
  """Reads the content of the box `moov`, wherever it is in the file."""
  for kind, start, size in _walk_file(file, file_size):
    if kind == b'moov':
      if size > _MAX_HEADER_BYTES:
        return None
      file.seek(start)
      content = file.read(size)
      return memoryview(content) if len(content) == size else None
  return None


def _walk_file(
  file: BinaryIO, file_size: int
) -> Iterator[tuple[bytes, int, int]]:
  """Yields kind, start of the content and its size of the boxes of a file."""
  position = 0
  while position + 8 <= file_size:
    file.seek(position)
    start = file.read(16).ljust(16, b'\0')
    size, kind = struct.unpack_from('>I4s', start)
    head = 8
    if size == 1:
      (size,) = struct.unpack_from('>Q', start, 8)
      head = 16
    size = size or file_size - position
    if size < head:
      return
    yield kind, position + head, size - head
    position += size


def _walk(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
  """Yields kind and content of the boxes in a box.

  Raises:
    ValueError: a box leaves the one it is in.
  """
  position = 0
  while position + 8 <= len(content):
    size, kind = struct.unpack_from('>I4s', content, position)
    if size < 8 or position + size > len(content):
      raise ValueError(f'box {kind!r} has {size} bytes')
    yield kind, content[position + 8 : position + size]
    position += size


def _find(content: memoryview, *path: bytes) -> memoryview | None:
  """Finds a box by the kinds on the way to it."""
  for wanted in path:
    for kind, inner in _walk(content):
      if kind == wanted:
        content = inner
        break
    else:
      return None
  return content


def _get_handler(track: memoryview) -> bytes:
  """Returns what a track holds: b'vide', b'soun', ..."""
  handler = _find(track, b'mdia', b'hdlr')
  return b'' if handler is None else bytes(handler[8:12])
