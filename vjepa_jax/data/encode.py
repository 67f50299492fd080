"""Writes clips as encoded video files."""

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
    stream = container.add_stream('libx264', rate=fps, options=options)
    stream.height, stream.width = clip.shape[1:3]
    stream.pix_fmt = 'yuv420p'
    stream.codec_context.thread_count = 1
    for image in clip:
      frame = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(image), format='rgb24'
      )
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
