"""Writes the physics set: films of a small world, possible and impossible.

python -m vjepa_jax.tools.physics_set --output=data/physics
"""

from pathlib import Path
from types import SimpleNamespace

from vjepa_jax.sets import physics
from vjepa_jax.tools import command


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('output', 'data/physics', 'Folder of the set.')
  define.integer('num_train', 2000, 'Possible training films.')
  define.integer(
    'num_sets',
    16,
    'Sets of four test films for each property, with a screen and without.',
  )
  define.integer('seed', 0, 'Seed.')


def main(options: SimpleNamespace) -> None:
  """Writes the set."""
  folder = Path(options.output)
  physics.write_physics_set(
    folder,
    num_train=options.num_train,
    num_sets=options.num_sets,
    seed=options.seed,
  )
  kinds = 2 * len(physics.PROPERTIES)
  print(
    f'{options.num_train} possible training films and '
    f'{2 * kinds * options.num_sets} pairs of test films are in {folder}'
  )


if __name__ == '__main__':
  command.run(main, define_flags)
