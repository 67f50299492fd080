"""What other tools left in the folders of a run: numbers and pictures.

A folder that holds `results.json` or pictures is a section of the report; no
tool has to be known.
"""

import collections
from collections.abc import Iterator, Sequence
import json
import re
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from vjepa_jax.plots import report
from vjepa_jax.plots.charts import Chart, draw_all_charts
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
  charts: list[Chart]  # of its `metrics.jsonl`


def read_sections(workdir: epath.Path) -> list[Section]:
  """Reads the sections of all folders below a run, in the order of names."""
  sections = []
  for path in _find_folders(workdir, _DEPTH):
    title = report.name(' / '.join(path.relative_to(workdir).parts))
    title = title[:1].upper() + title[1:]
    section = read_section(path, title, charts=_draw_curves(path, title))
    if section is not None:
      sections.append(section)
  return sections


def read_section(
  path: epath.Path,
  title: str,
  without: Sequence[str] = (),
  charts: Sequence[Chart] = (),
) -> Section | None:
  """Reads results and pictures of one folder.

  Args:
    path: The folder.
    title: Title of the section.
    without: Names of pictures to leave alone.
    charts: Curves that belong to it.

  Returns:
    The section; None if there is nothing in it.
  """
  results = read_json(path / 'results.json')
  results = results if isinstance(results, dict) else {}
  section = Section(
    title,
    report.find_texts(results),
    list(report.tabulate(results)),
    *_read_pictures(path, without),
    list(charts),
  )
  return section if any(section[1:]) else None


def read_json(path: epath.Path) -> Any:
  """Reads a JSON file; None if it is missing, or only half written."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    logging.warning('left out %s: %s', path, error)
    return None


def _find_folders(path: epath.Path, depth: int) -> Iterator[epath.Path]:
  for child in sorted(path.iterdir(), key=str) if depth else ():
    skipped = child.name in _SKIPPED or child.name.startswith(('.', '_'))
    if not skipped and child.is_dir():
      yield child
      yield from _find_folders(child, depth - 1)


def _draw_curves(path: epath.Path, title: str) -> list[Chart]:
  """Draws what a task that trains something logged into the folder."""
  try:
    return draw_all_charts(read_metrics(path), title)
  except (KeyError, TypeError, ValueError) as error:
    logging.warning('left out %s/metrics.jsonl: %s', path, error)
    return []


def _read_pictures(
  path: epath.Path, without: Sequence[str]
) -> tuple[list[report.Picture], list[str]]:
  found = sorted(
    child
    for child in path.iterdir()
    if child.suffix.lower() in report.MEDIA_TYPES and child.name not in without
  )
  # A film that is there as GIF and MP4 is shown once.
  stems = {child.stem for child in found if child.suffix == '.gif'}
  found = [c for c in found if c.suffix != '.mp4' or c.stem not in stems]
  pictures, left_out = [], []
  for child in found:
    if len(pictures) == _MAX_PICTURES or child.stat().length > _MAX_BYTES:
      left_out.append(child.name)
      continue
    content, caption = child.read_bytes(), report.name(child.stem)
    try:
      pictures.append(report.embed(content, child.suffix.lower(), caption))
    except OSError as error:
      # Half of it, maybe: a tool is writing.
      logging.warning('left out %s: %s', child, error)
  return pictures, left_out


def read_quarantine(workdir: epath.Path) -> dict[str, Any] | None:
  """Reads which videos were replaced, on all hosts: counts and first lines."""
  failures = []
  for path in sorted(workdir.glob('quarantine*.jsonl')):
    for line in path.read_text().splitlines():
      try:
        failures.append(json.loads(line))
      except ValueError:
        continue  # half written
  if not failures:
    return None
  reasons = collections.Counter(
    # With its numbers nearly every reason would be the only one of its kind.
    re.sub(r'[\d.]*\d', '…', failure['reason'])
    for failure in failures
  )
  return {
    'count': len(failures),
    'reasons': reasons.most_common(),
    'first': failures[:_MAX_FAILURES],
  }
