"""Writes clips as encoded video files."""

from collections.abc import Iterable
from fractions import Fraction
import itertools
from pathlib import Path

import av
import numpy as np

# With its macroblock tree x264 gives different files on different runs.
_OPTIONS = {
  'preset': 'veryfast',
  'crf': '18',
  'x264-params': 'mbtree=0:threads=1',
}
# No frame looks ahead: what is decoded up to a frame says nothing of the rest.
_CAUSAL = {
  'tune': 'zerolatency',
  'x264-params': 'mbtree=0:threads=1:scenecut=0',
}


def write_video(
  path: str | Path, clip: np.ndarray, fps: float, *, causal: bool = False
) -> None:
  """Encodes a clip as H.264, the same bytes each time.

  Args:
    path: File to write; its suffix names the container.
    clip: uint8 `[frames, height, width, 3]`, sides even.
    fps: Frames a second.
    causal: Encode each frame from the frames before it alone, so that clips
      that begin alike are decoded alike up to where they differ.
  """
  options = _OPTIONS | (_CAUSAL if causal else {})
  with av.open(str(path), 'w') as container:
    write_frames(container, clip, clip.shape[1:3], fps, options)


def write_frames(
  container: av.container.OutputContainer,
  frames: Iterable[np.ndarray],
  size: tuple[int, int],
  rate: float | Fraction,
  options: dict[str, str],
  times: tuple[Iterable[int], Fraction] | None = None,
) -> None:
  """Encodes frames as 8-bit 4:2:0 H.264, the same bytes each time.

  Args:
    container: Where to write.
    frames: uint8 `[height, width, 3]` each.
    size: Their height and width, even.
    rate: Frames a second.
    options: Of x264.
    times: When each is shown, in ticks, and the seconds of a tick; evenly
      where it is None.
  """
  stream = container.add_stream('libx264', rate=rate, options=options)
  stream.height, stream.width = size
  stream.pix_fmt = 'yuv420p'
  # With several threads the bytes could differ from run to run.
  stream.codec_context.thread_count = 1
  ticks, base = times or (itertools.repeat(None), None)
  if base:
    stream.time_base = stream.codec_context.time_base = base
  for image, tick in zip(frames, ticks, strict=False):
    frame = av.VideoFrame.from_ndarray(
      np.ascontiguousarray(image), format='rgb24'
    )
    if base:
      frame.pts, frame.time_base = tick, base
    container.mux(stream.encode(frame))
  container.mux(stream.encode())
