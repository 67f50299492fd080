"""When the pictures of an MPEG-4 video (DivX, Xvid) in an AVI file are shown.

AVI numbers packets in decoding order and says nothing of presentation. With B
pictures the order follows from the kinds of the pictures, which each packet
says at its start (ISO/IEC 14496-2, section 6.2.5): a B picture is shown at
once, any other when the next of the others comes.
"""

import re

_PICTURE = re.compile(rb'\x00\x00\x01\xb6(.)', re.DOTALL)
_B = 2
# Where two pictures share a packet, a later one is a placeholder of at most so
# many bytes.
_MAX_PLACEHOLDER_BYTES = 19


class Order:
  """Takes the packets of a stream, and says when each is shown.

  Attributes:
    is_packed: Some packets hold two pictures.
  """

  def __init__(self) -> None:
    self.is_packed = False
    self._packets = []  # decoding time, size, kinds of the pictures

  def add(self, time: int | None, packet: bytes) -> bool:
    """Takes the next packet in decoding order and its decoding time.

    Returns:
      Whether decoding can start with it, if it is a keyframe.
    """
    # I 0, P 1, B 2, S 3.
    kinds = [match[1][0] >> 6 for match in _PICTURE.finditer(packet)]
    self._packets.append((time, len(packet), kinds))
    self.is_packed |= len(kinds) > 1
    return True

  def compute_times(self) -> dict[int, int] | None:
    """Computes from the decoding times when pictures are shown.

    Returns:
      None where packets do not hold what they should.
    """
    times, shown, held, waiting = [], [], None, []
    for time, size, kinds in self._packets:
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
