"""Where paths become bytes: listing, reading and replacing files.

A path is local, or an address such as `gs://bucket/folder` that fsspec knows.
Remote storage that fails is asked again for minutes; what is left then is a
`StorageError`, which is nobody's mistake and no fault of a video.
"""

from collections.abc import Callable, Iterator
import contextlib
import glob
import os
import pathlib
import random
import tempfile
import time
from typing import IO, Any, TypeVar

from absl import logging

from vjepa_jax.errors import UserError

Path = str | os.PathLike[str]
T = TypeVar('T')

# Seconds between attempts, on top of what the libraries try by themselves.
_PAUSES = (1, 2, 4, 8, 16, 32, 64)
# Answers that stay the same however often storage is asked.
_FINAL = (
  FileNotFoundError,
  IsADirectoryError,
  NotADirectoryError,
  NotImplementedError,
  TypeError,
  ValueError,
)
# What talks to remote storage. That something is not there, or cut off, is told
# by Python's own errors.
_CLIENTS = ('aiohttp', 'aiobotocore', 'botocore', 'gcsfs', 'google', 'requests')


class StorageError(Exception):
  """Remote storage failed for minutes; the same command may go on later."""


class AccessError(StorageError, PermissionError):
  """Remote storage does not allow it."""


def is_outage(error: BaseException) -> bool:
  """Says whether an error is of storage, not of what lies there."""
  package = type(error).__module__.partition('.')[0]
  kinds = StorageError, PermissionError, ConnectionError, TimeoutError
  return package in _CLIENTS or isinstance(error, kinds)


def is_remote(path: Path) -> bool:
  """Says whether a path has a scheme."""
  return '://' in os.fspath(path)


def exists(path: Path) -> bool:
  """Says whether there is a file or a folder."""
  if not is_remote(path):
    return os.path.exists(path)
  return _find_kind(path) is not None


def is_folder(path: Path) -> bool:
  """Says whether there is a folder."""
  if not is_remote(path):
    return os.path.isdir(path)
  return _find_kind(path) == 'directory'


def measure(path: Path) -> int:
  """Returns the size of a file in bytes."""
  if not is_remote(path):
    return os.path.getsize(path)
  return _ask(path, lambda system: system.info(path)['size'])


def read(path: Path) -> bytes:
  """Reads a whole file."""
  if not is_remote(path):
    return pathlib.Path(path).read_bytes()
  return _ask(path, lambda system: system.cat_file(path))


def read_range(path: Path, start: int, end: int) -> bytes:
  """Reads the bytes `start` to `end` of a remote file."""
  return _ask(path, lambda system: system.cat_file(path, start=start, end=end))


def open_file(path: Path, mode: str = 'rb') -> IO:
  """Opens a local file; text is UTF-8."""
  return open(path, mode, encoding=None if 'b' in mode else 'utf-8')


def make_folder(path: Path) -> None:
  """Makes a folder and those that it is in; remote storage has none."""
  if not is_remote(path):
    os.makedirs(path, exist_ok=True)


def replace(path: Path, content: str | bytes) -> None:
  """Writes a file whole or not at all."""
  if isinstance(content, str):
    content = content.encode()
  if is_remote(path):
    _ask(path, lambda system: system.pipe_file(path, content))
    return
  with replacing(path) as temporary, open(temporary, 'wb') as file:
    file.write(content)


def remove(path: Path) -> None:
  """Removes a file, if there is one."""
  if not is_remote(path):
    pathlib.Path(path).unlink(missing_ok=True)
    return
  with contextlib.suppress(FileNotFoundError):
    _ask(path, lambda system: system.rm_file(path))


def append(path: Path, text: str) -> None:
  """Adds to a file of text, which is made if missing."""
  if not is_remote(path):
    with open_file(path, 'a') as file:
      file.write(text)
    return
  # Object stores cannot append.
  before = read(path) if exists(path) else b''
  replace(path, before + text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
  """Gives a local path to write; it takes the place of `path` when all is done.

  What is to be remote is written locally first, and then uploaded.
  """
  if not is_remote(path):
    # Another host may be writing the same.
    temporary = f'{os.fspath(path)}.{os.uname().nodename}-{os.getpid()}.tmp'
    try:
      yield temporary
      # Who has seen that all is there may have removed what others had begun.
      if os.path.exists(temporary) or not os.path.exists(path):
        os.replace(temporary, path)
    finally:
      pathlib.Path(temporary).unlink(missing_ok=True)
    return
  with tempfile.TemporaryDirectory() as folder:
    temporary = os.path.join(folder, os.path.basename(path))
    yield temporary
    _upload(temporary, path)


@contextlib.contextmanager
def writing_folder(path: Path) -> Iterator[pathlib.Path]:
  """Gives a local folder to fill: `path`, or one that is then uploaded."""
  if not is_remote(path):
    yield pathlib.Path(path)
    return
  with tempfile.TemporaryDirectory() as folder:
    yield pathlib.Path(folder)
    upload_folder(folder, path)


def upload_folder(folder: Path, path: Path) -> None:
  """Uploads what is in a local folder."""
  for file in list_files(folder):
    name = os.path.relpath(file, folder)
    _upload(file, f'{os.fspath(path).rstrip("/")}/{name}')


def _upload(file: str, path: Path) -> None:
  _ask(path, lambda system: system.put_file(file, path))


def _download(path: str, file: str) -> None:
  _ask(path, lambda system: system.get_file(path, file))


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[str]:
  """Gives a local path of a file or folder, for what can read no other."""
  path = os.fspath(path)
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = os.path.join(folder, os.path.basename(path.rstrip('/')))
    for file in list_files(path):
      # Of a file itself it is a dot.
      name = os.path.normpath(os.path.join(copy, os.path.relpath(file, path)))
      os.makedirs(os.path.dirname(name), exist_ok=True)
      _download(file, name)
    yield copy


def list_files(path: Path) -> list[str]:
  """Lists the files below a folder, or those that a glob matches.

  Links are followed, but no folder is listed twice.

  Raises:
    FileNotFoundError: The path does not exist.
  """
  path = os.fspath(path)
  if is_remote(path):
    files = _list_remote(path, lambda system: system.find(path))
    if not files and glob.has_magic(path):
      return match(path)
  elif os.path.isdir(path):
    return _walk(path)
  elif glob.has_magic(path) and not os.path.exists(path):
    return match(path)
  else:
    files = [path] if os.path.exists(path) else []
  if not files:
    raise FileNotFoundError(f'{path} does not exist')
  return files


def match(pattern: str) -> list[str]:
  """Lists what a glob matches, `**` allowed."""
  if not is_remote(pattern):
    return glob.glob(pattern, recursive=True)
  return _list_remote(pattern, lambda system: system.glob(pattern))


def _walk(folder: str) -> list[str]:
  """Lists local files, under the names of folders rather than of links."""
  files, seen, waiting = [], set(), [folder]
  for top in waiting:  # which grows
    for path, folders, names in os.walk(top):
      status = os.stat(path)
      identity = status.st_dev, status.st_ino
      if identity in seen:
        folders.clear()
        continue
      seen.add(identity)
      files += [os.path.join(path, name) for name in names]
      inside = [os.path.join(path, name) for name in sorted(folders)]
      waiting += filter(os.path.islink, inside)
  return files


def _list_remote(path: str, ask: Callable[[Any], list[str]]) -> list[str]:
  """Lists addresses; file systems of fsspec leave the scheme out."""
  scheme = path.partition('://')[0]
  return [
    name if is_remote(name) else f'{scheme}://{name.lstrip("/")}'
    for name in _ask(path, ask)
  ]


def _find_kind(path: Path) -> str | None:
  """Returns 'file' or 'directory', None if there is nothing."""
  try:
    return _ask(path, lambda system: system.info(path)['type'])
  except FileNotFoundError:
    return None


def _ask(path: Path, ask: Callable[[Any], T]) -> T:
  """Asks the file system of an address, again where it fails for the moment.

  Args:
    path: The address.
    ask: Takes the file system of fsspec.

  Raises:
    StorageError: It failed every time.
    UserError: There is no such scheme, or its package is missing.
    AccessError: It is not allowed.
  """
  # Imported late: only remote paths need it, and it imports slowly.
  import fsspec

  path = os.fspath(path)
  scheme = path.partition('://')[0]
  pauses = iter(_PAUSES)
  while True:
    try:
      return ask(fsspec.filesystem(scheme))
    except ImportError as error:
      extra = ": pip install 'vjepa_jax[gcs]'" * (scheme == 'gs')
      raise UserError(f'{path} cannot be read: {error}{extra}') from error
    except _FINAL:
      raise
    # Each library has errors of its own.
    except Exception as error:
      if _is_forbidden(error):
        raise AccessError(f'{path}: {error}') from error
      pause = next(pauses, None)
      if pause is None:
        raise StorageError(f'{path}: {error!r}') from error
      logging.warning('%s: %r; asking again in %d s', path, error, pause)
    # Not all hosts at the same moment.
    time.sleep(pause * random.uniform(0.5, 1))


def _is_forbidden(error: Exception) -> bool:
  """Says whether an error of a library means that access is not allowed."""
  code = str(getattr(error, 'code', ''))
  return (
    isinstance(error, PermissionError)
    or code in ('401', '403')
    or str(error).startswith('Forbidden')
  )
