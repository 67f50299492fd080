"""A local cache of remote videos, so that not every epoch fetches them again.

`VJEPA_CACHE=FOLDER` turns it on, for a process and those that it starts, and
`VJEPA_CACHE_GIB` (100) bounds its size. The videos that were read longest ago
go first. A remote video that changes under its name is not noticed.
"""

import contextlib
import functools
import hashlib
import os
import tempfile

from absl import logging

from vjepa_jax.errors import UserError

# Of the size. What a process adds before it looks how full the folder is, and
# how full that may be then: so 32 processes together stay within the size.
_STEP, _FULL = 1 / 128, 3 / 4


class Cache:
  """A folder of files, shared by any number of processes."""

  def __init__(self, folder: str, num_bytes: float) -> None:
    """Makes the folder, whose files take at most so many bytes."""
    os.makedirs(folder, exist_ok=True)
    self._folder, self._num_bytes = folder, num_bytes
    self._added = num_bytes  # by this process since it looked

  def get(self, path: str) -> bytes | None:
    """Returns the content of a remote file; None if it is not here."""
    name = self._name(path)
    try:
      with open(name, 'rb') as file:
        os.utime(name)
        return file.read()
    except OSError:  # Whatever it is, it is no fault of the video.
      return None

  def put(self, path: str, content: bytes) -> None:
    """Keeps the content of a remote file, if there is room for it."""
    if len(content) > (1 - _FULL) * self._num_bytes:
      return
    try:
      self._added += len(content)
      if self._added > _STEP * self._num_bytes:
        self._make_room(len(content))
        self._added = len(content)
      # Under its name when it is whole: others fetch and read the same.
      with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      os.replace(file.name, self._name(path))
    except OSError as error:
      logging.warning('a video is not kept in %s: %s', self._folder, error)

  def _make_room(self, num_bytes: int) -> None:
    """Removes what was read longest ago."""
    files = []
    for entry in os.scandir(self._folder):
      with contextlib.suppress(FileNotFoundError):  # Others remove too.
        status = entry.stat()
        files.append((status.st_mtime, status.st_size, entry.path))
    excess = sum(size for _, size, _ in files) + num_bytes
    excess -= _FULL * self._num_bytes
    for _, size, path in sorted(files):
      if excess <= 0:
        return
      with contextlib.suppress(FileNotFoundError):
        os.remove(path)
      excess -= size

  def _name(self, path: str) -> str:
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return os.path.join(self._folder, digest)


@functools.cache
def open_cache() -> Cache | None:
  """Opens the cache that the environment names; None without one.

  Raises:
    UserError: It cannot be.
  """
  folder = os.environ.get('VJEPA_CACHE')
  size = os.environ.get('VJEPA_CACHE_GIB', '100')
  if not folder:
    return None
  try:
    if not float(size) > 0:
      raise ValueError(f'{size} GiB are none')
    return Cache(folder, float(size) * 2**30)
  except (OSError, ValueError) as error:
    raise UserError(
      f'VJEPA_CACHE={folder}, VJEPA_CACHE_GIB={size}: {error}'
    ) from error
