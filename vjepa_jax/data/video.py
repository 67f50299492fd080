"""What every open video can do, and videos that are decoded already."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses

import av
import cv2
import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.pixels import Box, crop, resize
from vjepa_jax.errors import UserError

# Frames given as an array carry no clock.
ARRAY_FPS = 30.0
# A time this close below a frame's own, in seconds, shows that frame: Matroska
# rounds times to milliseconds.
CLOCK_SLACK = 1e-3


class DecodeError(UserError):
  """A video that cannot be used; the message is a one-line reason.

  Attributes:
    name: Says which, where a source has no record that could.
  """

  def __init__(self, reason: str, name: str = '') -> None:
    super().__init__(reason)
    self.name = name


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one video may take.

  Attributes:
    seconds: Of computing to open it, and again to read frames of it once.
      Waiting for storage is not counted, which is not the video's fault.
    gib: Size of its file, in GiB.
  """

  seconds: float = 60.0
  gib: float = 16.0


DEFAULT_LIMITS = Limits()


def describe_error(error: Exception) -> str:
  """A one-line reason for an error of libav, OpenCV or the system."""
  if isinstance(error, av.error.InvalidDataError):
    return 'not a video, or its header is damaged or cut off'
  if isinstance(error, av.FFmpegError | OSError) and error.strerror:
    return f'cannot read: {error.strerror}'
  return f'cannot read: {" ".join(str(error).split())}'


@contextlib.contextmanager
def explain_damage(name: str) -> Iterator[None]:
  """Makes a DecodeError, of this name, of what parsers of files raise."""
  try:
    yield
  except DecodeError as error:
    raise DecodeError(str(error), name) from error
  except (storage.StorageError, UserError):
    raise  # of which what is read is not at fault
  except Exception as error:  # What parses has no common one.
    raise DecodeError(describe_error(error), name) from error


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
  """Makes a DecodeError of what libav, OpenCV or the system raise."""
  try:
    yield
  except (av.FFmpegError, OSError, cv2.error) as e:
    raise DecodeError(describe_error(e)) from e


class Video:
  """An open video.

  Attributes:
    times: float64 [N], presentation times of the frames in seconds, increasing
      from 0.
    num_frames: N.
    height: height in pixels as displayed, after rotation metadata. Pixels are
      taken to be square.
    width: width in pixels as displayed.
    fps: average frames per second.
  """

  def __init__(
    self, times: np.ndarray, height: int, width: int, fps: float
  ) -> None:
    self.times = times
    self.num_frames = len(times)
    self.height = height
    self.width = width
    self.fps = fps

  def __enter__(self) -> 'Video':
    return self

  def __exit__(self, *unused_args) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file, if there is one."""

  def read(
    self, indices: Sequence[int], box: Box, size: tuple[int, int]
  ) -> np.ndarray:
    """Reads frames as `read_boxes`, of one box: uint8 [T, *size, 3]."""
    return self.read_boxes(indices, [box], size)[0]

  def read_boxes(
    self, indices: Sequence[int], boxes: Sequence[Box], size: tuple[int, int]
  ) -> np.ndarray:
    """Reads frames once, and crops and resizes them in several ways.

    The resize is bilinear without antialiasing, as in the published
    pretraining. For 8-bit 4:2:0 video the luma and chroma planes are resized
    before the conversion to RGB, with the colour matrix and range the frame is
    tagged with. This differs from converting first by less than 2/255 on
    average on ordinary footage: libswscale repeats chroma samples instead of
    interpolating them, and truncates instead of rounding.

    Args:
      indices: T frame numbers in [0, num_frames), non-decreasing; repeats are
        allowed.
      boxes: V crops (top, left, height, width) in displayed pixels.
      size: (height, width) of the result in pixels.

    Returns:
      uint8 [V, T, size[0], size[1], 3], RGB.

    Raises:
      DecodeError: if a wanted frame cannot be decoded.
      ValueError: if the indices decrease or leave the video, or a box leaves
        the frame.
    """
    indices = np.asarray(indices, np.int64)
    self._check_request(indices, boxes, size)
    wanted, positions = np.unique(indices, return_inverse=True)
    with explain_errors():
      images = self._read_distinct(wanted, boxes, size)
    # Without repeats there is no reason to copy the clip.
    return images if len(wanted) == len(indices) else images[:, positions]

  def play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
    """Decodes the video once, from its start, as `prepare` needs it.

    Args:
      times: seconds, non-decreasing.

    Yields:
      For each time the whole frame on screen then, uint8 [height, width, 3].

    Raises:
      DecodeError: if no frame decodes, or damage leaves a hole.
    """
    raise NotImplementedError

  def _read_distinct(
    self, wanted: np.ndarray, boxes: Sequence[Box], size: tuple[int, int]
  ) -> np.ndarray:
    """Reads strictly increasing frame numbers; see `read_boxes`."""
    raise NotImplementedError

  def _check_request(
    self, indices: np.ndarray, boxes: Sequence[Box], size: tuple[int, int]
  ) -> None:
    """Raises ValueError for a request that no video could answer."""
    if indices.ndim != 1 or not indices.size:
      raise ValueError(f'indices must be a non-empty list, got {indices}')
    if (np.diff(indices) < 0).any():
      raise ValueError(f'indices must not decrease, got {indices.tolist()}')
    if indices[0] < 0 or indices[-1] >= self.num_frames:
      raise ValueError(
        f'indices {indices[0]}..{indices[-1]} leave a video of '
        f'{self.num_frames} frames'
      )
    for top, left, height, width in boxes:
      inside = (
        0 <= top < top + height <= self.height
        and 0 <= left < left + width <= self.width
      )
      if not inside:
        raise ValueError(
          f'box (top, left, height, width) = {(top, left, height, width)} '
          f'leaves a frame of {self.height}x{self.width} pixels'
        )
    if min(size) < 1:
      raise ValueError(f'size must be positive, got {tuple(size)}')


class ArrayVideo(Video):
  """Frames that are already decoded, uint8 [N, H, W, 3]."""

  def __init__(self, frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
      raise DecodeError(
        'frames must be uint8 [N, H, W, 3], got '
        f'{frames.dtype} {list(frames.shape)}'
      )
    if not frames.size:
      raise DecodeError('no frames')
    times = np.arange(len(frames)) / ARRAY_FPS
    super().__init__(times, frames.shape[1], frames.shape[2], ARRAY_FPS)
    self._frames = frames

  def play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
    for time in times:
      number = np.searchsorted(self.times, time + CLOCK_SLACK, 'right') - 1
      yield self._frames[max(number, 0)]

  def _read_distinct(
    self, wanted: np.ndarray, boxes: Sequence[Box], size: tuple[int, int]
  ) -> np.ndarray:
    views = [
      [resize(crop(self._frames[i], box), size) for i in wanted]
      for box in boxes
    ]
    return np.stack(views)
