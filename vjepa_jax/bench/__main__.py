"""Measures this package on the machine at hand, beside others where it can.

python -m vjepa_jax.bench step|data|masks|compile [--rounds=N] [--json=FILE]
python -m vjepa_jax.bench faults [--json=FILE]

Times of the same work are taken in turn; what is printed last is the ratio,
ours over theirs: under 1 is faster.
"""

import argparse
import importlib
import sys

from vjepa_jax.bench.measure import write_result
from vjepa_jax.errors import UserError
from vjepa_jax.tools import command

# Sub-command: (module, help). Nothing heavy is imported here: decoding workers
# import this file again.
_COMMANDS = {
  'step': ('step', 'a training step on the CPU, against torch'),
  'data': ('data', 'decoding and batches, against decord and torchcodec'),
  'masks': ('masks', 'mask sampling, against the decoding of a clip'),
  'compile': ('compilation', 'time to the first step, cold and cached'),
  'faults': ('faults', 'runs that are killed or meet damage; mistakes'),
}


def main(argv: list[str] | None = None) -> int:
  """Runs one sub-command; what is wrong is one line, without a traceback."""
  parser = argparse.ArgumentParser(
    prog='python -m vjepa_jax.bench', description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(dest='command', required=True)
  for name, (module, text) in _COMMANDS.items():
    options = commands.add_parser(name, help=text, description=text)
    options.add_argument('--rounds', type=int, help='timed rounds')
    options.add_argument('--json', metavar='FILE', help='where to write')
    options.add_argument(
      '--quick', action='store_true', help='toy sizes: does it run at all?'
    )
    benchmark = importlib.import_module(f'vjepa_jax.bench.{module}')
    for name, option in benchmark.OPTIONS.items():
      options.add_argument(f'--{name}', **option)
    options.set_defaults(run=benchmark.run)
  arguments = parser.parse_args(argv)

  def measure():
    if arguments.rounds is not None and arguments.rounds < 1:
      raise UserError(f'--rounds={arguments.rounds} is not positive')
    write_result(arguments.json, arguments.run(arguments))

  return command.guard(measure)


if __name__ == '__main__':
  sys.exit(main())
