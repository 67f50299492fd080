"""What other tools left in the folders of a run: numbers and pictures.

A folder that holds `results.json` or pictures is a section of the report; no
tool has to be known.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import io
import json
from typing import Any

from absl import logging
from etils import epath
from PIL import Image

from vjepa_jax.plots.charts import Chart, draw_all_charts
from vjepa_jax.training.telemetry import read_metrics

_PICTURES = {
  '.png': 'image/png',
  '.gif': 'image/gif',
  '.jpg': 'image/jpeg',
  '.svg': 'image/svg+xml',
  '.webp': 'image/webp',
  '.mp4': 'video/mp4',
}
_PIXELS = ('.png', '.gif', '.jpg', '.webp')
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
_MAX_ROWS = 40
_LONG_TEXT = 60
_SHORT_LIST = 8


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture in the page.

  Attributes:
    caption: What it shows.
    kind: 'image' or 'video'.
    uri: Its content.
    size: Width and height in pixels, None if not known.
  """

  caption: str
  kind: str
  uri: str
  size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
  """A number or a word in a table.

  Attributes:
    text: What is shown.
    share: For a bar under it, 0..1; None for none.
  """

  text: str
  share: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table with a title, which may be empty.

  Attributes:
    title: What it is about.
    columns: Names of the columns after the first; empty for name and value.
    rows: Name and cells of each row.
    left_out: Number of rows that there was no room for.
  """

  title: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, tuple[Cell, ...]], ...]
  left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Section:
  """What a folder holds.

  Attributes:
    title: Its path in the run, in words.
    texts: Sentences among the results.
    tables: The other results.
    pictures: In the order of their names.
    left_out: Names of pictures that were too many or too large.
    charts: Curves of its `metrics.jsonl`.
  """

  title: str
  texts: tuple[str, ...]
  tables: tuple[Table, ...]
  pictures: tuple[Picture, ...]
  left_out: tuple[str, ...]
  charts: tuple[Chart, ...] = ()


def name(text: str) -> str:
  """Turns the name of a file or of a value into words."""
  return text.replace('_', ' ').strip()


def embed(content: bytes, suffix: str, caption: str) -> Picture:
  """Makes a picture of the content of a file.

  Args:
    content: The file, whole.
    suffix: What it is, '.png' for example.
    caption: What it shows.

  Raises:
    OSError: It is no picture, or not all of it.
  """
  kind = _PICTURES[suffix]
  size = None
  if suffix in _PIXELS:
    with Image.open(io.BytesIO(content)) as image:
      image.load()
      size = image.size
  uri = f'data:{kind};base64,{base64.b64encode(content).decode()}'
  return Picture(caption, kind.partition('/')[0], uri, size)


def read_sections(workdir: epath.Path) -> list[Section]:
  """Reads the sections of all folders below a run, in the order of names."""
  sections = []
  for path in _find_folders(workdir, _DEPTH):
    title = name(' / '.join(path.relative_to(workdir).parts))
    title = title[:1].upper() + title[1:]
    section = read_section(path, title)
    curves = _draw_curves(path, title)
    if section is None and curves:
      section = Section(title, (), (), (), ())
    if section is not None:
      sections.append(dataclasses.replace(section, charts=curves))
  return sections


def _draw_curves(path: epath.Path, title: str) -> tuple[Chart, ...]:
  """Draws what a task that trains something logged into the folder."""
  try:
    return tuple(draw_all_charts(read_metrics(path), title))
  except (KeyError, TypeError, ValueError) as error:
    logging.warning('left out %s/metrics.jsonl: %s', path, error)
    return ()


def _find_folders(path: epath.Path, depth: int) -> Iterator[epath.Path]:
  if not depth:
    return
  for child in sorted(path.iterdir(), key=str):
    skipped = child.name in _SKIPPED or child.name.startswith(('.', '_'))
    if not skipped and child.is_dir():
      yield child
      yield from _find_folders(child, depth - 1)


def read_section(
  path: epath.Path, title: str, without: Sequence[str] = ()
) -> Section | None:
  """Reads results and pictures of one folder.

  Args:
    path: The folder.
    title: Title of the section.
    without: Names of pictures to leave alone.

  Returns:
    The section; None if the folder holds neither.
  """
  texts, tables = (), ()
  results = read_json(path / 'results.json')
  if isinstance(results, dict):
    texts = tuple(str(v) for v in results.values() if _is_long(v))
    tables = tuple(tabulate(results))
  pictures, left_out = _read_pictures(path, without)
  if not (texts or tables or pictures or left_out):
    return None
  return Section(title, texts, tables, tuple(pictures), tuple(left_out))


def read_json(path: epath.Path) -> Any:
  """Reads a JSON file; None if it is missing, or only half written."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    logging.warning('left out %s: %s', path, error)
    return None


def _read_pictures(path, without):
  found = sorted(
    child
    for child in path.iterdir()
    if child.suffix.lower() in _PICTURES and child.name not in without
  )
  # A film that is there as GIF and MP4 is shown once.
  stems = {child.stem for child in found if child.suffix == '.gif'}
  found = [c for c in found if c.suffix != '.mp4' or c.stem not in stems]
  pictures, left_out = [], []
  for child in found:
    if len(pictures) == _MAX_PICTURES or child.stat().length > _MAX_BYTES:
      left_out.append(child.name)
      continue
    suffix = child.suffix.lower()
    try:
      pictures.append(embed(child.read_bytes(), suffix, name(child.stem)))
    except OSError as error:
      # Half of it, maybe: a tool is writing.
      logging.warning('left out %s: %s', child, error)
  return pictures, left_out


def tabulate(results: Mapping[str, Any], title: str = '') -> Iterator[Table]:
  """Makes tables of nested results.

  Numbers and words become a table of two columns, maps with the keys of another
  one become the rows of a table, and so do the entries of a list of maps; other
  maps become tables of their own, and long lists of numbers are left out.

  Args:
    results: What a `results.json` holds.
    title: Of the table of numbers and words.
  """
  plain = {k: v for k, v in results.items() if _is_plain(v) and not _is_long(v)}
  if plain:
    yield _make_table(title, (), {k: (v,) for k, v in plain.items()})
  maps = {k: v for k, v in results.items() if isinstance(v, dict) and v}
  while maps:
    first = max(maps, key=lambda key: _is_flat(maps[key]) * len(maps[key]))
    columns = maps[first]
    group = {
      k: v
      for k, v in maps.items()
      if k == first or (_is_flat(columns) and set(v) <= set(columns))
    }
    maps = {k: v for k, v in maps.items() if k not in group}
    if len(group) > 1:
      rows = {k: tuple(v.get(c) for c in columns) for k, v in group.items()}
      yield _make_table(title, tuple(columns), rows, bars=True)
    else:
      yield from tabulate(columns, f'{title} / {name(first)}'.strip(' /'))
  for key, value in results.items():
    if isinstance(value, list) and value and isinstance(value[0], dict):
      columns = tuple(k for k, v in value[0].items() if _is_plain(v))
      rows = {
        str(i + 1): tuple(entry.get(k) for k in columns)
        for i, entry in enumerate(value)
      }
      heading = f'{title} / {name(key)}'.strip(' /')
      yield _make_table(heading, columns, rows)


def _is_plain(value: Any) -> bool:
  if isinstance(value, list):
    flat = not any(isinstance(v, dict | list) for v in value)
    return flat and len(value) <= _SHORT_LIST
  return not isinstance(value, dict)


def _is_flat(values: Mapping[str, Any]) -> bool:
  return all(map(_is_plain, values.values()))


def _is_long(value: Any) -> bool:
  return isinstance(value, str) and len(value) > _LONG_TEXT


def _make_table(title, columns, rows, bars=False) -> Table:
  """Makes a table; with bars if all of it are numbers from 0 to 1."""
  shown = list(rows.items())[:_MAX_ROWS]
  values = [v for row in rows.values() for v in row if v is not None]
  bars = bars and all(isinstance(v, float) and 0.01 <= v <= 1 for v in values)
  return Table(
    title,
    tuple(map(name, columns)),
    tuple(
      (
        name(key),
        tuple(
          Cell(f'{v:.3f}', v)
          if bars and v is not None
          else Cell(format_value(v))
          for v in row
        ),
      )
      for key, row in shown
    ),
    len(rows) - len(shown),
  )


def format_value(value: Any) -> str:
  """Formats a number, a word or a short list for reading."""
  if value is None:
    return '–'
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, int):
    return f'{value:,}'.replace(',', ' ') if value > 99999 else str(value)
  if isinstance(value, float):
    return f'{value:.4g}'
  if isinstance(value, list | tuple):
    return ', '.join(map(format_value, value)) or '–'
  return str(value)
