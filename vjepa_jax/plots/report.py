"""The page about a run, rendered from numbers and pictures alone.

What fills it is gathered by `vjepa_jax.tools.report`.
"""

import base64
from collections.abc import Iterator, Mapping
import io
import mimetypes
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from vjepa_jax.plots.figures import choose_steps

# Beyond these a page gets too long to read.
_MAX_ROWS = 40
_LONG_TEXT = 60
_SHORT_LIST = 8
_MAX_FRAMES = 8
_TILE = 112  # pixels of a frame in a strip, about
_GAP = 2


class Picture(NamedTuple):
  """A picture or film in the page."""

  caption: str
  uri: str  # with its content
  size: tuple[int, int] | None  # width and height in pixels, where known


class Table(NamedTuple):
  """A table; without columns its rows are names and values."""

  title: str
  columns: list[str]  # after the first, of the names of the rows
  rows: list[tuple[str, list[Any]]]
  bars: bool  # all are shares, 0..1
  left_out: int  # rows that there was no room for


def render(content: Mapping[str, Any]) -> str:
  """Renders the page, HTML; see report.html for what it shows."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__, ''),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  template = environment.get_template('report.html')
  return template.render(content, format=format_value)


def is_picture(file: str) -> bool:
  """Says whether a file of that name is one that `embed` takes."""
  return file.lower().endswith(
    ('.png', '.gif', '.jpg', '.svg', '.webp', '.mp4')
  )


def embed(content: bytes, file: str, caption: str) -> Picture:
  """Makes a picture of the content of a file.

  Args:
    content: The file, whole.
    file: Its name, which says what it is.
    caption: What it shows.

  Raises:
    OSError: It is no picture, or not all of it.
  """
  media_type, _ = mimetypes.guess_type(file, strict=False)
  size = None
  if media_type not in ('image/svg+xml', 'video/mp4'):
    with Image.open(io.BytesIO(content)) as image:
      image.load()
      size = image.size
  uri = f'data:{media_type};base64,{base64.b64encode(content).decode()}'
  return Picture(caption, uri, size)


def make_strip(
  caption: str, frames: np.ndarray, num_steps: int, resolution: int
) -> Picture:
  """Puts frames side by side, one a step in time.

  Args:
    caption: What they show.
    frames: `[n, h, w, 3]`, 0..1, of pixels or of tokens: they become as large.
    num_steps: Steps of the clip, of which some are shown.
    resolution: Height and width of the clip.
  """
  shown = choose_steps(num_steps, _MAX_FRAMES) * len(frames) // num_steps
  # Whole multiples keep pixels square.
  side = min(resolution, _TILE) * max(1, round(_TILE / resolution))
  # Transparent in between: the page may be light or dark.
  width = len(shown) * (side + _GAP) - _GAP
  strip = Image.new('RGBA', (width, side))
  for i, frame in enumerate(np.clip(255 * frames[shown], 0, 255)):
    tile = Image.fromarray(frame.astype(np.uint8))
    tile = tile.resize((side, side), Image.Resampling.BOX)
    strip.paste(tile, (i * (side + _GAP), 0))
  buffer = io.BytesIO()
  strip.save(buffer, 'png')
  return embed(buffer.getvalue(), 'strip.png', caption)


def name(text: str) -> str:
  """Turns the name of a file or of a value into words."""
  return text.replace('_', ' ').strip()


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


def find_texts(results: Mapping[str, Any]) -> list[str]:
  """Finds the sentences among results, which no table has room for."""
  return [value for value in results.values() if _is_long(value)]


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
    rows = [(name(key), [value]) for key, value in plain.items()]
    yield Table(title, [], rows, False, 0)
  maps = {k: v for k, v in results.items() if isinstance(v, dict) and v}
  flat = {k: all(map(_is_plain, v.values())) for k, v in maps.items()}
  while maps:
    first = max(maps, key=lambda key: flat[key] * len(maps[key]))
    columns = maps[first].keys()
    rows = {
      k: maps[k]
      for k in maps
      if k == first or (flat[first] and maps[k].keys() <= columns)
    }
    maps = {k: v for k, v in maps.items() if k not in rows}
    if len(rows) > 1:
      yield _make_table(title, columns, rows)
    else:
      yield from tabulate(rows[first], _join(title, first))
  for key, value in results.items():
    if isinstance(value, list) and value and isinstance(value[0], dict):
      columns = [k for k, v in value[0].items() if _is_plain(v)]
      rows = dict(enumerate(value, start=1))
      yield _make_table(_join(title, key), columns, rows)


def _join(title: str, key: str) -> str:
  return f'{title} / {name(key)}'.strip(' /')


def _is_plain(value: Any) -> bool:
  if isinstance(value, list):
    flat = not any(isinstance(v, dict | list) for v in value)
    return flat and len(value) <= _SHORT_LIST
  return not isinstance(value, dict)


def _is_long(value: Any) -> bool:
  return isinstance(value, str) and len(value) > _LONG_TEXT


def _make_table(title, columns, rows) -> Table:
  """Makes a table of maps."""
  cells = [
    (name(str(key)), [row.get(column) for column in columns])
    for key, row in rows.items()
  ]
  values = [v for _, row in cells for v in row if v is not None]
  bars = all(isinstance(v, float) and 0.01 <= v <= 1 for v in values)
  titles = list(map(name, columns))
  left_out = max(0, len(cells) - _MAX_ROWS)
  return Table(title, titles, cells[:_MAX_ROWS], bars, left_out)
