"""How a made set is written: once, in threads, finished when its marker is."""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import contextlib
import json
import os
import pathlib
from typing import Any

from absl import logging

from vjepa_jax.data import storage
from vjepa_jax.progress import make_bar


def write_once(
  marker: pathlib.Path, options: dict[str, Any], write: Callable[[], None]
) -> None:
  """Writes a set unless it is finished.

  Args:
    marker: JSON file of what the set was made with, named after the set. It is
      written last.
    options: What the set is made with, JSON.
    write: Writes the rest of the set into the marker's folder.

  Raises:
    ValueError: There is another set.
  """
  options = json.loads(json.dumps(options))
  if storage.exists(marker):
    found = json.loads(storage.read(marker))
    for name, value in options.items():
      if found.get(name) != value:
        raise ValueError(
          f'{marker.parent} holds another {marker.stem} set, with '
          f'{name}={found.get(name)}, not {value}: give another folder, or '
          'delete this one'
        )
    logging.info('The %s set in %s is complete.', marker.stem, marker.parent)
    return
  storage.make_folder(marker.parent)
  write()
  storage.replace(marker, json.dumps(options, indent=2) + '\n')


def clear_split(folder: pathlib.Path, split: str) -> None:
  """Makes the folder of a split, without what an interrupted run left there."""
  storage.make_folder(folder / split)
  for leftover in (folder / split).glob('[0-9]*.mp4'):
    leftover.unlink()


def write_manifest(
  path: pathlib.Path, names: Sequence[str], labels: Sequence[int]
) -> None:
  """Writes the lines `name label` of a manifest."""
  lines = [f'{a} {b}\n' for a, b in zip(names, labels, strict=True)]
  storage.replace(path, ''.join(lines))


@contextlib.contextmanager
def open_pool(
  total: int, unit: str, workers: int | None
) -> Iterator[tuple[concurrent.futures.Executor, Callable[[], Any]]]:
  """Gives threads, one a processor by default, and what counts a done unit."""
  with (
    make_bar(total=total, desc=f'writing {unit}s', unit=unit) as bar,
    concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool,
  ):
    yield pool, bar.update
