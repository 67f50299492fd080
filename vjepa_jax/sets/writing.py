"""How a made set is written: once, in threads, finished when its marker is."""

from collections.abc import Callable, Sequence
import concurrent.futures
import json
import pathlib
from typing import Any

from absl import logging

from vjepa_jax.data import storage
from vjepa_jax.errors import UserError
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
    UserError: There is another set.
  """
  options = json.loads(json.dumps(options))
  if storage.exists(marker):
    found = json.loads(storage.read(marker))
    for name, value in options.items():
      if found.get(name) != value:
        raise UserError(
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


def map_in_threads(
  function: Callable[[Any], Any], items: Sequence[Any], unit: str
) -> list[Any]:
  """Calls a function on all items, in threads and in their order."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    results = pool.map(function, items)
    bar = make_bar(results, total=len(items), desc=f'{unit}s', unit=unit)
    return list(bar)
