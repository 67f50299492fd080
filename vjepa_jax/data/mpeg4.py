"""When the pictures of an MPEG-4 video (DivX, Xvid) in an AVI file are shown.

AVI numbers packets in decoding order and says nothing of presentation. With B
pictures the order follows from the kinds of the pictures, which each packet
says at its start (ISO/IEC 14496-2, section 6.2.5): a B picture is shown at
once, any other when the next of the others comes.
"""

from collections.abc import Iterable
import re

_PICTURE = re.compile(rb'\x00\x00\x01\xb6(.)', re.DOTALL)
_B = 2
# Where two pictures share a packet, a later one is a placeholder of at most so
# many bytes.
_MAX_PLACEHOLDER_BYTES = 19


def read_kinds(packet: bytes) -> list[int]:
  """Reads the kinds of the pictures in a packet: I 0, P 1, B 2, S 3."""
  return [match[1][0] >> 6 for match in _PICTURE.finditer(packet)]


def order_pictures(
  packets: Iterable[tuple[int, int, list[int]]],
) -> dict[int, int] | None:
  """Finds out when the picture of each packet is shown.

  Args:
    packets: Decoding time, size in bytes and kinds of the pictures of each, in
      decoding order.

  Returns:
    From decoding to presentation times; None where packets do not hold what
    they should.
  """
  times, shown, held, waiting = [], [], None, []
  for time, size, kinds in packets:
    if time is None or not 1 <= len(kinds) <= 2:
      return None
    # What waits is decoded in the place of this packet, which waits in turn.
    if not (waiting and size <= _MAX_PLACEHOLDER_BYTES):
      waiting += kinds
    kind = waiting.pop(0)
    times.append(time)
    if kind == _B:
      shown.append(time)
      continue
    if held is not None:
      shown.append(held)
    held = time
  if held is not None:
    shown.append(held)
  if sorted(set(times)) != times:
    return None
  return dict(zip(shown, times, strict=True))
