"""Where paths become bytes: listing, reading and replacing files.

A path is local, or has a scheme such as `gs://`, which `etils.epath` reads.
What is written is local.
"""

from collections.abc import Iterator
import contextlib
import glob
import os
import pathlib
import re
from typing import IO

Path = str | os.PathLike[str]


def is_remote(path: Path) -> bool:
  """Says whether a path has a scheme."""
  return '://' in os.fspath(path)


def exists(path: Path) -> bool:
  """Says whether there is a file or a folder."""
  return _parse(path).exists()


def is_folder(path: Path) -> bool:
  """Says whether there is a folder."""
  return _parse(path).is_dir()


def read(path: Path) -> bytes:
  """Reads a whole file."""
  return _parse(path).read_bytes()


def open_file(path: Path, mode: str = 'rb') -> IO:
  """Opens a file; text is UTF-8."""
  return open(path, mode, encoding=None if 'b' in mode else 'utf-8')


def make_folder(path: Path) -> None:
  """Makes a folder and those that it is in, if missing."""
  os.makedirs(path, exist_ok=True)


def replace(path: Path, content: str | bytes) -> None:
  """Writes a file whole or not at all."""
  if isinstance(content, str):
    content = content.encode()
  # Another host may be writing the same.
  temporary = f'{os.fspath(path)}.{os.uname().nodename}-{os.getpid()}.tmp'
  with open(temporary, 'wb') as file:
    file.write(content)
  os.replace(temporary, path)


def remove(path: Path) -> None:
  """Removes a file, if there is one."""
  _parse(path).unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
  """Gives a path to write, which takes the place of `path` when all is done."""
  temporary = f'{os.fspath(path)}.tmp'
  yield temporary
  os.replace(temporary, path)


def list_files(path: str) -> list[str]:
  """Lists the files below a folder, or those that a glob matches.

  Raises:
    FileNotFoundError: The path does not exist.
  """
  if glob.has_magic(path) and not exists(path):
    return match(path)
  if not exists(path):
    raise FileNotFoundError(f'{path} does not exist')
  if not is_folder(path):
    return [path]
  if is_remote(path):
    return match(f'{path.rstrip("/")}/**/*')
  return [
    os.path.join(folder, file)
    for folder, _, files in os.walk(path, followlinks=True)
    for file in files
  ]


def match(pattern: str) -> list[str]:
  """Lists what a glob matches, `**` allowed."""
  if not is_remote(pattern):
    return glob.glob(pattern, recursive=True)
  root = re.split(r'/[^/]*[*?\[]', pattern, maxsplit=1)[0]
  relative = pattern.removeprefix(f'{root}/')
  return [os.fspath(path) for path in _parse(root).glob(relative)]


def _parse(path: Path) -> pathlib.Path:
  """Returns an object with the methods of `pathlib.Path`."""
  if not is_remote(path):
    return pathlib.Path(path)
  # Imported late: only remote paths need it, and it imports slowly.
  from etils import epath

  return epath.Path(path)
