"""Writes the discs set: episodes of random play in a small world to act in.

python -m vjepa_jax.tools.discs_set --output=data/discs
"""

from types import SimpleNamespace

from vjepa_jax.data import storage
from vjepa_jax.sets import discs
from vjepa_jax.tools import command


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('output', 'Folder of the set.', 'data/discs')
  define.integer('num_train', 'Episodes.', 3000)
  define.integer('seed', 'Seed.', 0)


def main(options: SimpleNamespace) -> None:
  """Writes the set."""
  with storage.writing_folder(options.output) as folder:
    discs.write_discs_set(
      folder, num_train=options.num_train, seed=options.seed
    )
  print(
    f'{options.num_train} episodes of {discs.FRAMES} frames are in '
    f'{options.output}'
  )


if __name__ == '__main__':
  command.run(main, define_flags)
