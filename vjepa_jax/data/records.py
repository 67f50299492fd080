"""Records: what sources hold of a video, and its bytes in an ArrayRecord shard.

The bytes are the length of a header as a little-endian uint32, the header, JSON
in UTF-8 with `label` and `name` among its fields, and the content: an encoded
file, or features; of an episode the arrays as npz and after them the file.
"""

import io
import json
import struct
import threading
from typing import NamedTuple

import numpy as np

from vjepa_jax.errors import UserError

NO_LABEL = -1
# NumPy parses headers by `ast`, which Python 3.11 cannot do in two threads at a
# time: now and then it is a SystemError.
_PARSING = threading.Lock()


class Record(NamedTuple):
  """One video."""

  # A path, the bytes of an encoded file, or uint8 [N, H, W, 3] frames.
  video: str | bytes | np.ndarray
  label: int  # class number, or -1
  name: str  # says which it is, in logs and lists of bad files


class VideoFeatures(NamedTuple):
  """Features of the clips of one video."""

  # float16 or float32 [segments, N, D], tokens in raster order over (t, h, w);
  # [segments, D] if they were pooled.
  features: np.ndarray
  label: int  # class number, or -1
  name: str
  index: int  # of the video in its source
  # float64 [segments, 2], when the first and the last frame of each clip are
  # shown, in seconds.
  times: np.ndarray


class Episode(NamedTuple):
  """What a robot did: a film, and the state of the robot at each frame."""

  # A path or the bytes of a file; or features of the frames of an encoder,
  # float16 or float32 [T, H, W, D].
  video: str | bytes | np.ndarray
  states: np.ndarray  # float32 [T, S]
  timestamps: np.ndarray  # float64 [T], seconds, increasing
  name: str
  extrinsics: np.ndarray | None = None  # float32 [T, E], of the camera
  actions: np.ndarray | None = None  # float32 [T, A], what was asked for then
  first_frame: int = 0  # of the film, that the first row belongs to


def check_label(record: Record | VideoFeatures, num_classes: int) -> None:
  """Raises UserError unless a record has one of the labels 0, 1, ..."""
  if not 0 <= record.label < num_classes:
    label = 'no label' if record.label < 0 else f'label {record.label}'
    raise UserError(
      f'{record.name} has {label}, training needs one from 0 to '
      f'{num_classes - 1}'
    )


def pack(record: Record | VideoFeatures | Episode) -> bytes:
  """Encodes a record whose video is the bytes of a file, or features."""
  fields = record._asdict()
  if isinstance(record, Episode):
    arrays = {k: x for k, x in fields.items() if isinstance(x, np.ndarray)}
    with io.BytesIO() as buffer:
      np.savez(buffer, **arrays)
      content = buffer.getvalue()
    fields = {k: fields[k] for k in ('name', 'first_frame')}
    fields |= {'label': NO_LABEL, 'episode': len(content)}
    if 'video' not in arrays:
      content += record.video
  elif isinstance(record, VideoFeatures):
    features = fields.pop('features')
    content = np.ascontiguousarray(features).tobytes()
    fields['times'] = np.asarray(record.times).tolist()
    form = {'shape': features.shape, 'dtype': features.dtype.name}
    fields['features'] = form
  else:
    content = fields.pop('video')
    if not isinstance(content, bytes):
      raise TypeError(f'video must be bytes, got {type(content)}')
  header = json.dumps(fields, ensure_ascii=False).encode()
  return struct.pack('<I', len(header)) + header + content


def load_arrays(data: bytes) -> dict[str, np.ndarray]:
  """Reads the arrays of an npz.

  Raises:
    ValueError: It is damaged, or something else.
  """
  try:
    with _PARSING, np.load(io.BytesIO(data)) as file:
      return dict(file)
  except Exception as error:  # What unzips and parses has no common one.
    raise ValueError(f'no arrays can be read: {error}') from error


def unpack(data: bytes) -> Record | VideoFeatures | Episode:
  """Decodes what `pack` encoded; features are read-only.

  Raises:
    ValueError: `data` was not written by `pack`.
  """
  try:
    (length,) = struct.unpack_from('<I', data)
    fields = json.loads(data[4 : 4 + length])
    label, name = int(fields['label']), str(fields['name'])
    content, form = memoryview(data)[4 + length :], fields.get('features')
    if 'episode' in fields:
      size = fields['episode']
      arrays = {'video': bytes(content[size:])}
      arrays |= load_arrays(content[:size])
      return Episode(**arrays, name=name, first_frame=fields['first_frame'])
    if form is None:
      return Record(bytes(content), label, name)
    features = np.frombuffer(content, form['dtype']).reshape(form['shape'])
    times = np.asarray(fields['times'])
    return VideoFeatures(features, label, name, fields['index'], times)
  except (struct.error, ValueError, LookupError, TypeError) as e:
    raise ValueError('not a record of vjepa_jax: bad header') from e
