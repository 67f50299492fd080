"""What other tools left in the folders of a run: numbers and pictures.

A folder that holds `results.json` or pictures is a section of the report; no
tool has to be known.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import json
import re
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from vjepa_jax.plots import charts, report
from vjepa_jax.training.telemetry import read_metrics

# Folders of a run that hold no results, and many files.
_SKIPPED = (
  'checkpoints',
  'compilation_cache',
  'profile',
  'smoke_videos',
  'tensorboard',
)
_DEPTH = 2
# Beyond these a page gets too large to send; what is left out is named.
_MAX_CHARTS = 12
_MAX_PICTURES = 24
_MAX_BYTES = 8 * 2**20
_MAX_FAILURES = 20


class Section(NamedTuple):
  """What a folder holds."""

  title: str
  texts: list[str]  # sentences among the results
  tables: list[report.Table]  # the other results
  pictures: list[report.Picture]
  left_out: list[str]  # names of pictures that were too many or too large
  charts: Sequence[charts.Chart]  # of its `metrics.jsonl`


def try_to(what: Any, function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function; None, and a line in the log, where it is not possible."""
  try:
    return function(*arguments)
  # A file may be half written; another version of the program, or another
  # machine, may lack anything.
  except Exception as error:
    text = ' '.join(str(error).split())
    logging.warning('left out %s: %s: %s', what, type(error).__name__, text)
    return None


def read_json(path: epath.Path) -> Any:
  """Reads a JSON file; None if it is missing, or only half written."""
  if not path.exists():
    return None
  return try_to(path, lambda: json.loads(path.read_text()))


def read_sections(workdir: epath.Path) -> Iterator[Section]:
  """Reads the sections of all folders below a run, in the order of names."""
  for path in _find_folders(workdir, _DEPTH):
    title = report.name(' / '.join(path.relative_to(workdir).parts))
    curves = try_to(f'{path}/metrics.jsonl', _draw_curves, path)
    section = read_section(path, title[:1].upper() + title[1:], (), curves)
    if section is not None:
      yield section


def read_section(
  path: epath.Path,
  title: str,
  without: Sequence[str] = (),
  curves: Sequence[charts.Chart] | None = None,
) -> Section | None:
  """Reads a folder, but for pictures `without`; None if it holds nothing."""
  results = read_json(path / 'results.json')
  results = results if isinstance(results, dict) else {}
  texts, tables = report.find_texts(results), report.tabulate(results)
  pictures = _read_pictures(path, without)
  section = Section(title, texts, list(tables), *pictures, curves or ())
  return section if any(section[1:]) else None


def _find_folders(path: epath.Path, depth: int) -> Iterator[epath.Path]:
  for child in sorted(path.iterdir(), key=str) if depth else ():
    skipped = child.name in _SKIPPED or child.name.startswith(('.', '_'))
    if not skipped and child.is_dir():
      yield child
      yield from _find_folders(child, depth - 1)


def _draw_curves(path: epath.Path) -> list[charts.Chart]:
  """Draws what a task that trains something logged into the folder."""
  metrics = read_metrics(path)
  groups = charts.group_rest(metrics)[:_MAX_CHARTS]
  return list(charts.draw_charts(metrics, groups))


def _read_pictures(
  path: epath.Path, without: Sequence[str]
) -> tuple[list[report.Picture], list[str]]:
  found = sorted(
    child
    for child in path.iterdir()
    if report.is_picture(child.name)
    and child.name not in without
    and child.is_file()  # and no link to nothing
  )
  # A film that is there as GIF and MP4 is shown once.
  stems = {child.stem for child in found if child.suffix == '.gif'}
  found = [c for c in found if c.suffix != '.mp4' or c.stem not in stems]
  small = [c for c in found if c.stat().length <= _MAX_BYTES][:_MAX_PICTURES]
  pictures = [try_to(child, _embed, child) for child in small]
  left_out = [child.name for child in found if child not in small]
  return list(filter(None, pictures)), left_out


def _embed(path: epath.Path) -> report.Picture:
  return report.embed(path.read_bytes(), path.name, report.name(path.stem))


def read_quarantine(workdir: epath.Path) -> dict[str, Any] | None:
  """Reads which videos were replaced, on all hosts: counts and first lines."""
  failures = [
    failure
    for path in sorted(workdir.glob('quarantine*.jsonl'))
    for line in (try_to(path, path.read_text) or '').splitlines()
    if (failure := try_to(path, json.loads, line))
  ]
  if not failures:
    return None
  # With its numbers nearly every reason would be the only one of its kind.
  reasons = collections.Counter(
    re.sub(r'[\d.]*\d', '…', failure['reason']) for failure in failures
  )
  return {
    'count': len(failures),
    'reasons': reasons.most_common(),
    'first': failures[:_MAX_FAILURES],
  }
