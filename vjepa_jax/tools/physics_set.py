"""Writes the physics set: films of a small world, possible and impossible.

python -m vjepa_jax.tools.physics_set --output=data/physics
"""

from pathlib import Path
import sys

from absl import app, flags

from vjepa_jax import mistakes
from vjepa_jax.sets import physics

_OUTPUT = flags.DEFINE_string('output', 'data/physics', 'Folder of the set.')
_NUM_TRAIN = flags.DEFINE_integer('num_train', 2000, 'Possible training films.')
_NUM_SETS = flags.DEFINE_integer(
  'num_sets',
  16,
  'Sets of four test films for each property, with a screen and without.',
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed.')


def main(argv: list[str]) -> None:
  """Writes the set."""
  if len(argv) > 1:
    raise ValueError(f'unknown argument {argv[1]!r}')
  folder = Path(_OUTPUT.value)
  physics.write_physics_set(
    folder,
    num_train=_NUM_TRAIN.value,
    num_sets=_NUM_SETS.value,
    seed=_SEED.value,
  )
  kinds = 2 * len(physics.PROPERTIES)
  print(
    f'{_NUM_TRAIN.value} possible training films and '
    f'{2 * kinds * _NUM_SETS.value} pairs of test films are in {folder}'
  )


if __name__ == '__main__':
  try:
    app.run(main, flags_parser=mistakes.parse_flags)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(mistakes.explain(error))
