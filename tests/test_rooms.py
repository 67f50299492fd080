"""Imports run one way, and jax and matplotlib stay in their rooms."""

import ast
from pathlib import Path

import pytest

import vjepa_jax

PACKAGE = Path(vjepa_jax.__file__).parent
# From the bottom: a room imports itself and what is below its line.
ORDER = (
  ('errors', 'progress'),
  ('masks',),
  ('data', 'parallel', 'compilation'),
  ('models', 'plots', 'sets'),
  ('training',),
  ('evaluation', 'world'),
  ('interop',),
  ('tasks',),
  ('tools',),
  ('bench',),
)
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
JAX = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'chex'}


def _read_imports(path):
  """Reads the dotted names that a file imports, in functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _list_files():
  for path in PACKAGE.rglob('*.py'):
    room = path.relative_to(PACKAGE).with_suffix('').parts[0]
    if room != '__init__':
      yield path, room


def test_every_room_has_its_place():
  assert {room for _, room in _list_files()} == set(RANKS)


@pytest.mark.parametrize('room', RANKS)
def test_imports_run_one_way(room):
  files = [path for path, of in _list_files() if of == room]
  for path in files:
    for name in _read_imports(path):
      top, _, rest = name.partition('.')
      if top == 'vjepa_jax':
        other = rest.partition('.')[0]
        assert other == room or RANKS[other] < RANKS[room], f'{path}: {name}'
      if room in ('data', 'masks', 'sets'):
        assert top not in JAX, f'{path}: {name}'
      if room != 'plots':
        assert top != 'matplotlib', f'{path}: {name}'
