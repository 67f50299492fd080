"""Records: what sources hold of a video, and its bytes in an ArrayRecord shard.

The bytes are the length of a header as a little-endian uint32, the header, JSON
in UTF-8 with `label` and `name` among its fields, and the content: an encoded
file, or features.
"""

import json
import struct
from typing import Any, NamedTuple

import numpy as np

NO_LABEL = -1


class Record(NamedTuple):
  """One video.

  Attributes:
    video: a path, the bytes of an encoded file, or uint8 [N, H, W, 3] frames.
    label: class number, or -1.
    name: says which video it is, in logs and lists of bad files.
  """

  video: str | bytes | np.ndarray
  label: int
  name: str


class VideoFeatures(NamedTuple):
  """Features of the clips of one video.

  Attributes:
    features: float16 or float32, `[segments, N, D]`, tokens in raster order
      over (t, h, w); `[segments, D]` if they were pooled.
    label: class number, or -1.
    name: says which video it is.
    index: of the video in its source.
    times: float64 `[segments, 2]`, when the first and the last frame of each
      clip are shown, in seconds.
  """

  features: np.ndarray
  label: int
  name: str
  index: int
  times: np.ndarray


def check_label(record: Record | VideoFeatures, num_classes: int) -> None:
  """Raises ValueError unless a record has one of the labels 0, 1, ..."""
  if not 0 <= record.label < num_classes:
    label = 'no label' if record.label < 0 else f'label {record.label}'
    raise ValueError(
      f'{record.name} has {label}, training needs one from 0 to '
      f'{num_classes - 1}'
    )


def pack_record(record: Record) -> bytes:
  """Encodes a record whose video is the bytes of a file."""
  if not isinstance(record.video, bytes):
    raise TypeError(f'video must be bytes, got {type(record.video)}')
  return _pack({'label': record.label, 'name': record.name}, record.video)


def unpack_record(data: bytes) -> Record:
  """Decodes what `pack_record` encoded.

  Raises:
    ValueError: `data` was not written by `pack_record`.
  """
  fields, video = _unpack(data)
  if 'features' in fields:
    raise ValueError(
      'the shards hold features of vjepa_jax.tools.extract, not videos'
    )
  return Record(bytes(video), fields['label'], fields['name'])


def pack_features(video: VideoFeatures) -> bytes:
  """Encodes the features of a video."""
  form = {'shape': video.features.shape, 'dtype': video.features.dtype.name}
  fields = {
    'label': video.label,
    'name': video.name,
    'index': video.index,
    'times': np.asarray(video.times).tolist(),
    'features': form,
  }
  return _pack(fields, np.ascontiguousarray(video.features).tobytes())


def unpack_features(data: bytes) -> VideoFeatures:
  """Decodes what `pack_features` encoded; the features are read-only.

  Raises:
    ValueError: `data` was not written by `pack_features`.
  """
  fields, content = _unpack(data)
  if 'features' not in fields:
    raise ValueError(
      'the shards hold videos, not features: make features of them with '
      'python -m vjepa_jax.tools.extract'
    )
  form = fields['features']
  return VideoFeatures(
    np.frombuffer(content, form['dtype']).reshape(form['shape']),
    fields['label'],
    fields['name'],
    fields['index'],
    np.asarray(fields['times']),
  )


def is_features(data: bytes) -> bool:
  """Says whether a packed record is of features, and not of a video.

  Raises:
    ValueError: `data` is no record.
  """
  return 'features' in _unpack(data)[0]


def _pack(fields: dict[str, Any], content: bytes) -> bytes:
  header = json.dumps(fields, ensure_ascii=False).encode()
  return struct.pack('<I', len(header)) + header + content


def _unpack(data: bytes) -> tuple[dict[str, Any], memoryview]:
  """Returns the header and the content, without a copy of the latter."""
  try:
    (length,) = struct.unpack_from('<I', data)
    fields = json.loads(data[4 : 4 + length])
  except (struct.error, ValueError) as e:
    raise ValueError('not a record of vjepa_jax: bad header') from e
  if not isinstance(fields, dict) or not {'label', 'name'} <= fields.keys():
    raise ValueError('not a record of vjepa_jax: bad header')
  return fields, memoryview(data)[4 + length :]
