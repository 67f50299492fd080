"""Writes the physics set: films of a small world, possible and impossible.

python -m vjepa_jax.tools.physics_set --output=data/physics
"""

from types import SimpleNamespace

from vjepa_jax.data import storage
from vjepa_jax.sets import physics
from vjepa_jax.tools import command


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('output', 'Folder of the set.', 'data/physics')
  define.integer('num_train', 'Possible training films.', 2000)
  define.integer(
    'num_sets', 'Sets of four films a property, with a screen and without.', 16
  )
  define.integer('seed', 'Seed.', 0)


def main(options: SimpleNamespace) -> None:
  """Writes the set."""
  with storage.writing_folder(options.output) as folder:
    physics.write_physics_set(
      folder,
      num_train=options.num_train,
      num_sets=options.num_sets,
      seed=options.seed,
    )
  kinds = 2 * len(physics.PROPERTIES)
  print(
    f'{options.num_train} possible training films and '
    f'{2 * kinds * options.num_sets} pairs of test films are in '
    f'{options.output}'
  )


if __name__ == '__main__':
  command.run(main, define_flags)
