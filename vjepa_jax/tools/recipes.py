"""The flag --config of training and planning, and the recipes there are."""

from importlib import util
from pathlib import Path
import re
import sys

from absl import flags
from ml_collections import config_dict, config_flags

from vjepa_jax.errors import UserError
from vjepa_jax.tools import command

# Nothing heavy is imported here: decoding workers import main.py again.

# What all recipes have in common; no recipe itself.
_COMMON = ('__init__.py', 'base.py')


def define_config(values: flags.FlagValues) -> None:
  """Defines --config=FILE:OPTIONS and its overrides, --config.NAME=VALUE."""
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Recipe: a file, or one that comes with the package; options after a '
    'colon. --config.NAME=VALUE, after it, changes a field.',
    flag_values=values,
  )
  values['config'].parser = _Parser(values['config'].parser)


class _Parser(flags.ArgumentParser):
  """Loads a recipe; says what there is where a file or a field is not."""

  def __init__(self, parser: flags.ArgumentParser):
    super().__init__()
    self._parser = parser

  def parse(self, path: str) -> config_dict.ConfigDict:
    file, colon, options = path.partition(':')
    config = self._parser.parse(f'{_find_recipe(file)}{colon}{options}')
    for argument in sys.argv:
      name = re.match(r'--?(?:no)?config\.([\w.]+)', argument)
      if name:
        _check_field(config, name[1])
    return config

  def flag_type(self) -> str:
    return 'config file'


def list_recipes() -> list[Path]:
  """Lists the recipes that come with the package."""
  spec = util.find_spec('configs')
  folders = spec.submodule_search_locations if spec else []
  paths = (path for f in folders for path in sorted(Path(f).glob('*.py')))
  return [path for path in paths if path.name not in _COMMON]


def format_recipes() -> str:
  """Says what each recipe is and which variants it has, from its docstring."""
  lines = []
  for path in list_recipes():
    text = command.read_docstring(path)
    options = re.search(r'^Options: (.*?)\.$', text, re.M | re.S)
    lines.append(f'configs/{path.name:<15}{text.splitlines()[0]}')
    if options:
      lines.append(f'{"":<23}{" ".join(options[1].split())}')
  return '\n'.join(lines)


def _find_recipe(file: str) -> str:
  """Finds a recipe in the folder at hand, else in the package."""
  shipped = list_recipes()
  if Path(file).is_file():
    return file
  for path in shipped:
    if Path(file) == Path(path.parent.name, path.name):
      return str(path)
  raise UserError(
    'no such file; recipes of the package are '
    + ', '.join(f'configs/{path.name}' for path in shipped)
  )


def _check_field(config: config_dict.ConfigDict, name: str) -> None:
  """Checks that a config has a field, by its dotted name."""
  path = 'config'
  for part in name.split('.'):
    if not isinstance(config, config_dict.ConfigDict):
      return
    if part not in config:
      raise UserError(
        f'there is no {path}.{part}; {path} has {", ".join(sorted(config))}'
      )
    path, config = f'{path}.{part}', config[part]
