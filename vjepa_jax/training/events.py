"""TensorBoard's event files, on remote storage too."""

from absl import logging
import tensorboardX
from tensorboardX import record_writer

from vjepa_jax.data import storage

# A file that is written again at every flush must not grow for days.
_PART_BYTES = 1 << 20


def open_writer(folder: str, purge_step: int) -> tensorboardX.SummaryWriter:
  """Opens a writer of scalars.

  Args:
    folder: Where its files go, local or remote.
    purge_step: What files of an interrupted run hold from this step on is not
      shown.
  """
  if storage.is_remote(folder):
    # In place of its own for two schemes, which want other packages.
    scheme = folder.partition(':')[0]
    record_writer.register_writer_factory(scheme, _Factory())
  return tensorboardX.SummaryWriter(folder, purge_step=purge_step)


class _Factory:
  """What tensorboardX opens files by."""

  def open(self, path: str) -> '_RemoteFile':
    return _RemoteFile(path)

  def directory_check(self, path: str) -> None:
    storage.make_folder(path)


class _RemoteFile:
  """A file that grows, in parts: remote storage cannot append."""

  def __init__(self, path: str) -> None:
    self._path = path
    self._parts = 0
    self._content = bytearray()

  def write(self, data: bytes) -> None:
    self._content += data

  def flush(self) -> None:
    """Uploads the last part."""
    # TensorBoard reads a folder's files in the order of their names.
    path = f'{self._path}.{self._parts:06d}'
    try:
      storage.replace(path, bytes(self._content))
    except storage.StorageError as error:
      # The same numbers are in metrics.jsonl. The thread that flushes would
      # end here, and the run wait for it.
      logging.warning('not written: %s', error)
      return
    if len(self._content) > _PART_BYTES:
      self._parts += 1
      self._content.clear()

  def close(self) -> None:
    self.flush()
