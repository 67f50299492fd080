"""Runs one task of a config: python main.py --config=... --workdir=...

See vjepa_jax/tools/train.py.
"""

# Nothing heavy is imported here: decoding workers import this file again.
from vjepa_jax.tools import command, train

if __name__ == '__main__':
  command.run(train.main, train.define_flags)
