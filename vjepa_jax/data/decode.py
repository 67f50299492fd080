"""Reads the frames of a clip out of an encoded video, and nothing else.

A clip is read by seeking to the keyframe before its first frame and decoding
what its frames need; only the pixels inside a crop are ever resized and
converted to RGB.

Wherever the container lies about its timestamps or cannot be seeked, the clip
is decoded from the start of the file instead, so what comes back is the frame
a sequential decode would have given. Whatever is wrong with a single file ends
as a `DecodeError` with a one-line reason, which a loader can turn into another
clip.
"""

from collections.abc import Iterator, Sequence
import itertools
import math
import os
import stat

import av
import numpy as np

from vjepa_jax.data import images, mp4, pixels, storage
from vjepa_jax.data.cache import open_cache
from vjepa_jax.data.container import Container
from vjepa_jax.data.frame_index import index_frames
from vjepa_jax.data.pixels import Box
from vjepa_jax.data.video import (
  CLOCK_SLACK,
  DEFAULT_LIMITS,
  ArrayVideo,
  DecodeError,
  Limits,
  Video,
  describe_error,
  explain_errors,
)

# Positions among the wanted frames, and the frames.
Found = Iterator[tuple[int, av.VideoFrame]]

# Decoders whose output is bit-identical when unwanted non-reference frames are
# skipped. AV1 is not among them: dav1d drops wanted frames.
_EXACT_WHEN_SKIPPING = frozenset(['h264', 'hevc', 'mpeg4', 'vp8', 'vp9'])
# A packet may legally produce no picture (a hidden reference, a leading frame
# of an open GOP). The picture on screen at that time stands in for it, but only
# over a gap shorter than this.
_MAX_GAP_SECONDS = 0.2
# By how many seconds to seek too early, in turn, until the keyframe comes.
# Streams without an index are seeked in by guessing, and the timestamps of the
# first packets then are guesses too.
_SECONDS_EARLIER = (0, 1, 4)
_UNINDEXED_FORMATS = frozenset(['mpeg', 'mpegts'])
# In an AVI file with two pictures in a packet, those after a keyframe come out
# damaged where decoding starts with it.
_PACKED_FRAMES = 12
_START_BYTES = 16  # of a file, which say whether it is an image


def open_video(
  video: str | bytes | np.ndarray, limits: Limits = DEFAULT_LIMITS
) -> Video:
  """Opens a video for reading clips; use it as a context manager.

  Args:
    video: path of a file, the bytes of an encoded file, or ready frames as
      uint8 [N, H, W, 3], which are taken to be `ARRAY_FPS` frames per second.
      A JPEG or PNG image is a video of one frame.
    limits: what reading it may take.

  Returns:
    The open video.

  Raises:
    DecodeError: if the file is missing, empty, truncated or not a video. That
      no frame of it decodes may show only when one is read.
    StorageError: if remote storage does not answer.
  """
  if isinstance(video, np.ndarray):
    return ArrayVideo(video)
  if isinstance(video, str | os.PathLike):
    video = _find_file(os.fspath(video), limits)
  elif not isinstance(video, bytes | bytearray | memoryview):
    raise TypeError(
      f'video must be a path, bytes or a uint8 array, got {type(video)}'
    )
  if not len(video):
    raise DecodeError('empty file')
  if isinstance(video, str):
    return EncodedVideo(video, limits)
  _check_size(len(video), limits)
  if images.is_image(video):
    return ArrayVideo(images.decode(video)[None])
  return EncodedVideo(bytes(video), limits)


def _find_file(path: str, limits: Limits) -> str | bytes:
  """Returns the path of a local video, or the bytes of a file."""
  try:
    if storage.is_remote(path):
      return _fetch(path, limits)
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
      raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):
      # Opening a pipe would wait for its writer.
      raise DecodeError('not a video: not a regular file')
    _check_size(status.st_size, limits)
    with storage.open_file(path) as file:
      # libav says less plainly why a file cannot be read.
      start = file.read(_START_BYTES)
      if images.is_image(start):
        return start + file.read()
      return path if start else b''
  except FileNotFoundError as e:
    raise DecodeError('file does not exist') from e
  except IsADirectoryError as e:
    raise DecodeError('not a video: a folder') from e
  except (DecodeError, storage.StorageError):
    raise  # the latter is no fault of the video
  except (OSError, ValueError) as e:
    raise DecodeError(describe_error(e)) from e


def _fetch(path: str, limits: Limits) -> bytes:
  """Reads a remote file, from the local cache if it is there."""
  cache = open_cache()
  content = cache and cache.get(path)
  if content is None:
    _check_size(storage.measure(path), limits)
    content = storage.read(path)
    if cache:
      cache.put(path, content)
  return content


def _check_size(size: int, limits: Limits) -> None:
  if size > limits.gib * 2**30:
    raise DecodeError(
      f'the file has {size / 2**30:.3g} GiB, more than {limits.gib:g}'
    )


class EncodedVideo(Video):
  """A video decoded on demand; see `open_video`."""

  def __init__(self, source: str | bytes, limits: Limits) -> None:
    """Opens and indexes `source`, a local path or the bytes of a file."""
    self._container = Container(source, limits)
    try:
      with explain_errors():
        mp4.check_counts(source)
        self._container.open()
        self._index = index_frames(self._container)
    except DecodeError:
      self.close()
      raise
    height, width = self._index.coded_size
    if self._index.quarter_turns % 2:
      height, width = width, height
    stream = self._container.stream
    pts = self._index.pts
    times = (pts - pts[0]) * float(stream.time_base)
    if len(times) > 1:
      fps = (len(times) - 1) / times[-1]
    else:
      fps = float(stream.average_rate or 1)
    super().__init__(times, height, width, fps)

  def close(self) -> None:
    self._container.close()

  def play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
    with explain_errors():
      yield from self._play(times)

  def _play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
    self._container.max_seconds = math.inf  # A whole video may take long.
    self._container.open()
    box, size = (0, 0, self.height, self.width), (self.height, self.width)
    remaining = iter(times)
    time = next(remaining, None)
    shown, shown_time = None, 0.0
    end = (None, math.inf)
    for frame, frame_time in itertools.chain(self._decode_timed(), [end]):
      shown = shown or frame
      if shown is None:
        raise DecodeError('no frame decodes')
      while time is not None and time + CLOCK_SLACK < frame_time:
        self._check_hole(time, shown_time)
        yield self._convert(shown, box, size)
        time = next(remaining, None)
      if time is None:
        return
      shown, shown_time = frame, frame_time

  def _decode_timed(self) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yields the frames that can be shown, and when, in seconds."""
    base = float(self._container.stream.time_base)
    for number, frame in enumerate(self._decode_good()):
      if self._index.by_ordinal:
        yield frame, self.times[min(number, self.num_frames - 1)]
      else:
        yield frame, (frame.pts - int(self._index.pts[0])) * base

  def _decode_good(self) -> Iterator[av.VideoFrame]:
    """Yields the frames that can be shown; others count as damage."""
    for frame in self._container.decode():
      has_time = frame.pts is not None or self._index.by_ordinal
      if frame.is_corrupt or not has_time:
        self._container.damaged = True
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

  def _read_distinct(
    self, wanted: np.ndarray, boxes: Sequence[Box], size: tuple[int, int]
  ) -> np.ndarray:
    result = np.empty((len(boxes), len(wanted), *size, 3), np.uint8)
    self._container.start_clock()

    def fill(found: Found) -> np.ndarray:
      done = np.zeros(len(wanted), bool)
      for position, frame in found:
        for clip, box in zip(result, boxes, strict=True):
          clip[position] = self._convert(frame, box, size)
        done[position] = True
        if position + 1 == len(wanted):
          break
      return done

    if self._index.by_ordinal:
      done = fill(self._find_by_ordinal(wanted))
    else:
      pts = self._index.pts[wanted].tolist()
      try:
        done = fill(self._find_after_seek(pts))
      except (av.FFmpegError, OSError):
        done = np.zeros(len(wanted), bool)  # It cannot be seeked in.
      if not done.all():
        done = fill(self._find_from_start(pts))
    if not done.all():
      time = self.times[wanted[np.argmin(done)]]
      raise DecodeError(f'the frame at {time:.3f} s does not decode')
    return result

  def _find_after_seek(self, pts: list[int]) -> Found:
    """Finds the frames of increasing timestamps.

    Gives up at the first frame that should have come and did not.
    """
    position = 0
    for frame in self._decode_wanted(pts):
      if frame.pts is None or frame.pts > pts[position]:
        return
      if frame.pts < pts[position]:
        continue
      if frame.is_corrupt:
        return
      yield position, frame
      position += 1

  def _find_from_start(self, pts: list[int]) -> Found:
    """As `_find_after_seek`, without seeking and skipping.

    A timestamp for which no picture exists gets the one on screen at that time,
    unless there was an error, which could have swallowed it.
    """
    container = self._container
    container.open()
    max_gap = _MAX_GAP_SECONDS / float(container.stream.time_base)
    position, shown = 0, None
    for frame in itertools.chain(self._decode_good(), [None]):
      time = math.inf if frame is None else frame.pts
      shown = shown or frame
      while position < len(pts) and pts[position] < time:
        near = shown is not None and abs(shown.pts - pts[position]) <= max_gap
        if near and not container.damaged:
          yield position, shown
        position += 1
      if position < len(pts) and pts[position] == time:
        yield position, frame
        position += 1
      if position == len(pts):
        return
      shown = frame

  def _find_by_ordinal(self, wanted: np.ndarray) -> Found:
    """Finds frame numbers by counting from the start."""
    self._container.open()
    for number, frame in enumerate(self._decode_good()):
      position = int(np.searchsorted(wanted, number))
      if position < len(wanted) and wanted[position] == number:
        yield position, frame

  def _decode_wanted(self, pts: list[int]) -> Iterator[av.VideoFrame]:
    """Seeks, and decodes no more than what increasing timestamps need.

    Frames come in presentation order, the wanted ones among them. Where the
    codec allows it, those that are neither wanted nor needed to decode others
    are left out, and so is what lies between the last wanted frame of a group
    of pictures and the keyframe that the next one needs.
    """
    container, codec = self._container, self._container.codec
    is_packed = self._index.is_packed
    may_skip = codec.name in _EXACT_WHEN_SKIPPING and not is_packed
    keys = [int(self._index.pts[0]), *self._index.key_pts.tolist()]
    latest = np.array(pts) - _PACKED_FRAMES * is_packed
    numbers = np.searchsorted(self._index.key_pts, latest, side='right')
    keys = [keys[number] for number in numbers]
    unsent, position = set(pts), 0
    packets = self._seek(keys[0])
    codec.skip_frame, skipping = 'DEFAULT', False
    last_key, resume_at = keys[0], None
    for packet in packets:
      if resume_at is not None and packet.pts != resume_at:
        continue
      resume_at = None
      is_wanted = packet.pts in unsent
      if may_skip and skipping == is_wanted:
        skipping = not is_wanted
        codec.skip_frame = 'NONREF' if skipping else 'DEFAULT'
      if packet.is_keyframe and packet.pts is not None:
        last_key = max(last_key, packet.pts)
      yield from container.send(packet)
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
        yield from container.send(None)
        codec.flush_buffers()
        resume_at = keys[position]
    yield from container.send(None)

  def _seek(self, key: int) -> Iterator[av.Packet]:
    """Yields the packets from a keyframe on; none if it is not to be found."""
    container = self._container
    base = float(container.stream.time_base)
    if key not in self._index.key_pts:
      # Before the first keyframe.
      container.seek(key)
      return container.demux()
    for seconds in _SECONDS_EARLIER[container.format in _UNINDEXED_FORMATS :]:
      container.seek(key - round(seconds / base))
      packets = container.demux()
      for packet in packets:
        if packet.pts == key and packet.is_keyframe:
          return itertools.chain([packet], packets)
        if packet.dts is not None and packet.dts > key:
          break
    return iter(())

  def _convert(
    self, frame: av.VideoFrame, box: Box, size: tuple[int, int]
  ) -> np.ndarray:
    """Crops, resizes, converts to RGB and turns upright, uint8 [h, w, 3]."""
    turns, stored = self._index.quarter_turns, self._index.coded_size
    box = pixels.turn_box_back(box, stored, turns)
    coded_size = size[::-1] if turns % 2 else size
    is_regular = (frame.height, frame.width) == stored
    if is_regular and frame.format.name in ('yuv420p', 'yuvj420p'):
      image = pixels.convert_planes(frame, box, coded_size)
    else:
      image = frame.to_ndarray(format='rgb24')
      if not is_regular:  # The resolution changed within the stream.
        image = pixels.resize(image, stored)
      image = pixels.resize(pixels.crop(image, box), coded_size)
    return np.rot90(image, turns) if turns else image
