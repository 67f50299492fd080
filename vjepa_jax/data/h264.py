"""When the pictures of an H.264 video in an AVI file are shown.

AVI numbers packets in decoding order and says nothing of presentation. The
headers of the slices say in which order pictures are shown (ITU-T H.264,
sections 7.3.2.1.1, 7.3.3 and 8.2.1.1): by a count that starts anew at every IDR
picture, of which they hold the low bits.
"""

from collections.abc import Iterable
import re
from typing import NamedTuple

_UNIT = re.compile(rb'\x00\x00\x01([^\x00])', re.DOTALL)
_SLICE, _IDR, _PARAMETERS = 1, 5, 7
# Headers are shorter.
_HEADER_BYTES = 64
# Profiles that say more of colour.
_HIGH = frozenset([44, 83, 86, 100, 110, 118, 122, 128, 244])


class _UnsupportedError(Exception):
  """A stream whose order is not found out here: interlaced, or rare."""


class _Parameters(NamedTuple):
  """Of a sequence: how many bits the numbers in a slice's header take."""

  frame_bits: int
  count_bits: int


class _Picture(NamedTuple):
  """What a packet says of its picture."""

  is_idr: bool
  is_reference: bool
  count: int  # its low bits


class _Bits:
  """Reads numbers from the start of a unit, bit by bit."""

  def __init__(self, unit: bytes) -> None:
    # A 3 after two zeros is there only so that no unit seems to start.
    data = unit[:_HEADER_BYTES].replace(b'\0\0\x03', b'\0\0')
    self._bits = ''.join(f'{byte:08b}' for byte in data)
    self._at = 0

  def read(self, count: int) -> int:
    """Reads an unsigned number of so many bits."""
    start, self._at = self._at, self._at + count
    if self._at > len(self._bits):
      raise _UnsupportedError('a header is cut off')
    return int(self._bits[start : self._at] or '0', 2)

  def read_golomb(self) -> int:
    """Reads an unsigned Exp-Golomb number, section 9.1."""
    zeros = 0
    while not self.read(1):
      zeros += 1
    return (1 << zeros) - 1 + self.read(zeros)


class Order:
  """Takes the packets of a stream, and says when each is shown."""

  is_packed = False  # pictures are one a packet, or are refused

  def __init__(self) -> None:
    self._times, self._pictures = [], []
    self._parameters = None
    self._is_supported = True

  def add(self, time: int | None, packet: bytes) -> bool:
    """Takes the next packet in decoding order and its decoding time.

    Returns:
      Whether decoding can start with it, if it is a keyframe.
    """
    if not self._is_supported:
      return False
    try:
      picture = self._read_picture(packet)
    except _UnsupportedError:
      self._is_supported = False
      return False
    self._times.append(time)
    self._pictures.append(picture)
    return picture.is_idr

  def compute_times(self) -> dict[int, int] | None:
    """Computes from the decoding times when pictures are shown.

    Returns:
      None where that cannot be said.
    """
    times, pictures = self._times, self._pictures
    if not (self._is_supported and pictures and pictures[0].is_idr):
      return None
    if None in times or times != sorted(set(times)):
      return None
    counts = list(_count_on(pictures, 1 << self._parameters.count_bits))
    if len(set(counts)) < len(counts):
      return None
    shown = [time for _, time in sorted(zip(counts, times, strict=True))]
    return dict(zip(shown, times, strict=True))

  def _read_picture(self, packet: bytes) -> _Picture:
    """Reads the headers of a packet, which holds one picture."""
    found = []
    for match in _UNIT.finditer(packet):
      kind, start = match[1][0] & 31, match.end()
      unit = packet[start : start + _HEADER_BYTES]
      if kind == _PARAMETERS:
        parameters = _read_parameters(_Bits(unit))
        if self._parameters not in (None, parameters):
          raise _UnsupportedError('the sizes of numbers change')
        self._parameters = parameters
      elif kind in (_SLICE, _IDR):
        if self._parameters is None:
          raise _UnsupportedError('a slice before any parameters')
        bits, is_idr = _Bits(unit), kind == _IDR
        first = bits.read_golomb()
        bits.read_golomb(), bits.read_golomb()  # kind, picture parameters
        bits.read(self._parameters.frame_bits)
        if is_idr:
          bits.read_golomb()  # tells IDR pictures apart
        if not first:  # another slice is of the same picture
          count = bits.read(self._parameters.count_bits)
          found.append(_Picture(is_idr, bool(match[1][0] & 0x60), count))
    if len(found) != 1:
      raise _UnsupportedError(f'{len(found)} pictures in a packet')
    return found[0]


def _read_parameters(bits: _Bits) -> _Parameters:
  """Reads the parameters of a sequence."""
  profile = bits.read(8)
  bits.read(16)  # constraints, level
  bits.read_golomb()  # its number
  if profile in _HIGH:
    if bits.read_golomb() == 3:
      raise _UnsupportedError('4:4:4')
    bits.read_golomb(), bits.read_golomb()  # depths
    bits.read(1)
    if bits.read(1):
      raise _UnsupportedError('scaling matrices')
  frame_bits = bits.read_golomb() + 4
  if bits.read_golomb():
    raise _UnsupportedError('counts that are not in the slices')
  count_bits = bits.read_golomb() + 4
  bits.read_golomb()  # reference frames
  bits.read(1)
  bits.read_golomb(), bits.read_golomb()  # width, height
  if not bits.read(1):
    raise _UnsupportedError('interlaced')
  return _Parameters(frame_bits, count_bits)


def _count_on(
  pictures: Iterable[_Picture], period: int
) -> Iterable[tuple[int, int]]:
  """Yields for each picture the number of its IDR picture and its count."""
  group, before = 0, 0
  for picture in pictures:
    if picture.is_idr:
      group, before = group + 1, 0
    # Of the counts with these low bits, the one next to the last reference's;
    # of two that are as near the later one.
    ahead = (picture.count - before) % period
    count = before + ahead - period * (ahead > period // 2)
    yield group, count
    if picture.is_reference:
      before = count
