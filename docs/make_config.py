"""Writes config.md: every field of a pretraining recipe, from configs/base.py.

python docs/make_config.py

The words are the comments there: those above a statement belong to all that it
sets, those above or behind an entry to the entry.
"""

import ast
from pathlib import Path

_HERE = Path(__file__).parent
_BASE = _HERE.parent / 'configs' / 'base.py'
_HEAD = """# Fields of a recipe

Any of them can be set on the command line, `--config.encoder.size=base`. These
are the neutral values of `configs/base.py`, which each recipe starts from and
`python docs/make_config.py` writes this page from. Recipes of probes,
fine-tuning and decoders take what they need of them and name the rest in their
own files.
"""


def make_page(source: str) -> str:
  """Makes the page from the text of configs/base.py."""
  lines = source.splitlines()
  function = next(
    node
    for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef) and node.name == 'get_config'
  )
  groups, alone = [], []
  for statement in function.body:
    name = _get_target(statement)
    if name is None:
      continue
    words = _read_above(lines, statement.lineno)
    rows = list(_list_entries(lines, name, statement.value))
    if isinstance(statement.value, ast.Call) and rows:
      groups.append((name, words, rows))
    else:
      value = ast.unparse(statement.value)
      words = ' '.join(filter(None, [words, _read_behind(lines, statement)]))
      alone.append((name, _show(value), words))
  text = [_HEAD, *_format('The run', '', alone)]
  for name, words, rows in groups:
    text += _format(f'`{name}`', words, rows)
  return '\n'.join(text) + '\n'


def _get_target(statement: ast.stmt) -> str | None:
  """Returns 'a.b' of a statement that sets config.a.b, else None."""
  if not isinstance(statement, ast.Assign):
    return None
  name = ast.unparse(statement.targets[0])
  return name.removeprefix('config.') if name.startswith('config.') else None


def _list_entries(lines, prefix, value):
  """Yields name, default and words of each entry of a dict(...) call."""
  if not (isinstance(value, ast.Call) and ast.unparse(value.func) == 'dict'):
    return
  for entry in value.keywords:
    name = f'{prefix}.{entry.arg}'
    words = _read_above(lines, entry.lineno)
    nested = list(_list_entries(lines, name, entry.value))
    if nested:
      yield from nested
      continue
    # Where several stand on one line, the words behind it are of them all.
    words = ' '.join(filter(None, [words, _read_behind(lines, entry)]))
    yield name, _show(ast.unparse(entry.value)), words


def _read_above(lines: list[str], number: int) -> str:
  """Reads the comment lines directly above a line, counted from 1."""
  words = []
  while lines[number - 2].lstrip().startswith('#'):
    number -= 1
    words.insert(0, lines[number - 1].strip().removeprefix('#').strip())
  return ' '.join(words)


def _read_behind(lines: list[str], node: ast.AST) -> str:
  """Reads the comment at the end of a node's last line."""
  _, mark, words = lines[node.end_lineno - 1][node.end_col_offset :].rpartition(
    '  #'
  )
  return words.strip() if mark else ''


def _show(value: str) -> str:
  """Shows a default: a placeholder is a field that may be None."""
  if value.startswith('config_dict.placeholder('):
    return f'None ({value.removeprefix("config_dict.placeholder(")[:-1]})'
  return value


def _format(title: str, words: str, rows: list[tuple[str, str, str]]):
  text = [f'## {title}', '']
  if words:
    text += [words, '']
  text += ['| field | default | |', '|---|---|---|']
  text += [
    f'| `{name}` | `{value}` | {words.replace("|", "/")} |'
    for name, value, words in rows
  ]
  return [*text, '']


if __name__ == '__main__':
  (_HERE / 'config.md').write_text(make_page(_BASE.read_text()))
