"""What all commands share: flags, the log, errors in one line, exit codes.

A command is a module with `define_flags(define)`, in which for example
`define.integer('seed', 'Seed.', 0, least=0)` defines a flag, without a default
None, and `main(options, *words)` of the flags' values and the words beside
them. It ends with

  if __name__ == '__main__':
    command.run(main, define_flags)
"""

import ast
from collections.abc import Callable, Sequence
import faulthandler
import functools
import importlib
import inspect
from pathlib import Path
import sys
import traceback
from types import SimpleNamespace
from typing import Any, NoReturn

from absl import flags, logging

from vjepa_jax.errors import UserError

# Nothing heavy is imported here: decoding workers import main.py again.

# Exit codes; see launch/restart.sh.
FAILURE, MISTAKE = 1, 2

# Takes the options, a namespace of all flags, and the words; returns the exit
# code, None for 0.
Main = Callable[..., int | None]

_PACKAGE = Path(__file__).parents[1]


def run(main: Main, define_flags: Callable[..., None]) -> NoReturn:
  """Runs a command as its command line says, and exits."""
  faulthandler.enable()
  logging.use_absl_handler()
  logging.get_absl_handler().addFilter(_is_worth_telling)
  logging.set_verbosity(logging.INFO)
  # The flags of absl itself, which Grain and logging read.
  flags.FLAGS.mark_as_parsed()

  def parse_and_run():
    options, words = parse(main, define_flags, sys.argv[1:])
    return main(options, *words)

  sys.exit(guard(parse_and_run))


def parse(
  main: Main, define_flags: Callable[..., None], arguments: Sequence[str]
) -> tuple[SimpleNamespace, list[str]]:
  """Parses the command line of a command.

  Returns:
    The values of all flags by name, and the words beside the flags.

  Raises:
    UserError: A flag or a word is wrong, or missing.
  """
  values = flags.FlagValues()
  define = SimpleNamespace(values=values)
  for kind in ('bool', 'enum', 'float', 'integer', 'list', 'string'):
    setattr(define, kind, functools.partial(_define, values, kind))
  define_flags(define)
  if {'-h', '--help', '--helpfull'} & set(arguments):
    print(f'{inspect.getmodule(main).__doc__}\nflags:\n{values.get_help()}')
    sys.exit(0)
  values.append_flag_values(flags.FLAGS)
  try:
    words = values([sys.argv[0], *arguments])[1:]
  except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A config file that fails to load quotes its whole traceback.
    quoted = 'Traceback' in str(error)
    raise UserError(lines[-1] if quoted else ' '.join(lines)) from None
  signature = inspect.signature(main)
  try:
    signature.bind(None, *words)
  except TypeError:
    _, *wanted = signature.parameters
    if not wanted:
      raise UserError(f'unknown argument {words[0]!r}') from None
    found = ', '.join(words) or 'none'
    raise UserError(f'give one {wanted[0]}, got {found}') from None
  return SimpleNamespace(**values.flag_values_dict()), words


def _define(values, kind, name, text, default=None, *choices, **options):
  """Defines a flag; of an enum, `choices` holds what it may be."""
  if 'least' in options:
    options['lower_bound'] = options.pop('least')
  function = getattr(flags, f'DEFINE_{kind}')
  function(name, default, *choices, text, flag_values=values, **options)


def guard(function: Callable[[], int | None]) -> int:
  """Calls a function; an error becomes one line and an exit code.

  The traceback of what is not the user's mistake goes to the log.
  """
  try:
    return function() or 0
  except (Exception, KeyboardInterrupt) as error:
    mistake = _is_mistake(error)
    if not mistake or flags.FLAGS.verbosity > 0:
      logging.error('%s', type(error).__name__, exc_info=error)
    kind = '' if mistake else f'{type(error).__name__}: '
    message = ' '.join(str(error).split())
    print(f'error: {kind}{message}', file=sys.stderr, flush=True)
    return MISTAKE if mistake else FAILURE


def _is_mistake(error: BaseException) -> bool:
  """Says whether the error is the user's, not the program's or a machine's."""
  frames = traceback.walk_tb(error.__traceback__)
  trained = any('training/loop.py' in f.f_code.co_filename for f, _ in frames)
  return isinstance(error, UserError) or (
    isinstance(error, FileNotFoundError | PermissionError) and not trained
  )


def _is_worth_telling(record: Any) -> bool:
  """Filters the log: of other packages, warnings are enough."""
  ours = Path(record.pathname).is_relative_to(_PACKAGE)
  return ours or record.levelno >= logging.logging.WARNING


def read_docstring(path: Path) -> str:
  """Reads the docstring of a module without importing it."""
  return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''


def start() -> NoReturn:
  """Runs the command that the first word names: the program `vjepa`."""
  commands = {
    path.stem: path
    for path in sorted(Path(__file__).parent.glob('*.py'))
    if '\ndef define_flags(' in path.read_text(encoding='utf-8')
  }
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  if name not in commands:
    for other, path in commands.items():
      print(f'vjepa {other:<17}{read_docstring(path).splitlines()[0]}')
    sys.exit(0 if name in ('-h', '--help') else MISTAKE)
  sys.argv[:2] = [f'vjepa {name}']
  module = importlib.import_module(f'vjepa_jax.tools.{name}')
  run(module.main, module.define_flags)
