"""Files of TensorBoard on remote storage: in parts, whole, never in the way."""

import struct

from tensorboardX.proto import event_pb2

from vjepa_jax.data import storage
from vjepa_jax.training import events


def _read_steps(folder):
  """Reads the steps of all scalars of a folder."""
  data = b''.join(map(storage.read, sorted(storage.list_files(folder))))
  steps = []
  while data:
    (size,) = struct.unpack_from('<Q', data)
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    steps += [event.step for _ in event.summary.value]
    data = data[16 + size :]
  return steps


def test_event_files_are_uploaded_in_parts(monkeypatch):
  monkeypatch.setattr(events, '_PART_BYTES', 1000)
  folder = 'memory://bucket/parts'
  writer = events.open_writer(folder, purge_step=1)
  for step in range(1, 101):
    writer.add_scalar('loss', 1 / step, step)
    if step % 10 == 0:
      writer.flush()
  writer.close()
  assert _read_steps(folder) == list(range(1, 101))
  files = storage.list_files(folder)
  assert len(files) > 2
  assert all(storage.measure(file) < 3000 for file in files)


def test_storage_that_fails_does_not_stop_the_run(monkeypatch):
  folder = 'memory://bucket/failing'
  writer = events.open_writer(folder, purge_step=1)

  def fail(path, content):
    raise storage.StorageError('gone')

  with monkeypatch.context() as patch:
    patch.setattr(storage, 'replace', fail)
    for step in range(1, 31):  # more than the queue holds
      writer.add_scalar('loss', 1 / step, step)
      writer.flush()
  writer.close()
  assert _read_steps(folder) == list(range(1, 31))
