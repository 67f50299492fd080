"""Mistakes of the user: one line and an exit code of their own.

What is wrong with flags, config or data is found before anything is trained,
and running again does not help.
"""

import sys
import traceback

from absl import flags

EXIT_CODE = 2


def is_mistake(error: BaseException) -> bool:
  """Says whether the error is the user's, not the program's or a machine's."""
  frames = traceback.walk_tb(error.__traceback__)
  trained = any('training/loop.py' in f.f_code.co_filename for f, _ in frames)
  return isinstance(error, (ValueError, FileNotFoundError)) and not trained


def explain(error: BaseException) -> int:
  """Prints a mistake as one line, anything else with its traceback.

  Returns:
    The exit code that goes with it.
  """
  mistake = is_mistake(error)
  if mistake and flags.FLAGS.verbosity < 1:
    _print(error)
  else:
    traceback.print_exception(error)
  return EXIT_CODE if mistake else 1


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags, for `app.run`; a wrong one ends the program in one line."""
  try:
    return flags.FLAGS(argv)
  except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A config file that fails to load quotes its whole traceback.
    _print(lines[-1] if 'Traceback' in str(error) else ' '.join(lines))
    return sys.exit(EXIT_CODE)


def _print(message) -> None:
  print(f'error: {message}', file=sys.stderr)
