"""How the state of each recipe is laid out, as text that people can read.

`python tests/parallel/dump_shardings.py` writes golden/*.txt anew.
"""

import functools
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from configs import vjepa1, vjepa2
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.tasks.program import build_objective
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.state import TrainState, init_state

RECIPES = {
  'vjepa1_l16': (vjepa1, 'l16'),
  'vjepa1_h16': (vjepa1, 'h16'),
  'vjepa2_l16': (vjepa2, 'l16'),
  'vjepa2_h16': (vjepa2, 'h16'),
  'vjepa2_g16': (vjepa2, 'g16'),
}
FSDP = (8, 16)
GOLDEN = Path(__file__).parent / 'golden'


def build_abstract_state(name: str) -> TrainState:
  """Builds the shapes of a recipe's state; nothing is computed."""
  module, variant = RECIPES[name]
  config = module.get_config(variant)
  # The devices decide about kernels alone, not about parameters.
  mesh = mesh_lib.make_mesh(1, jax.devices()[:1])
  init = functools.partial(
    init_state,
    build_objective(config, mesh),
    make_optimizer(**config.optimizer),
  )
  return jax.eval_shape(init, jax.random.key(0))


def make_abstract_mesh(fsdp: int) -> AbstractMesh:
  """Makes a mesh of devices that do not exist."""
  return AbstractMesh((1, fsdp), ('data', 'fsdp'))


def describe_shardings(state: TrainState) -> str:
  """Writes a line for each parameter: path, shape, and spec by fsdp."""
  specs = [
    jax.tree.leaves(sharding.shard_tree(state.params, make_abstract_mesh(fsdp)))
    for fsdp in FSDP
  ]
  rows = [('# parameter', 'shape', *(f'fsdp={fsdp}' for fsdp in FSDP))]
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  for (path, leaf), *row in zip(leaves, *specs, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    shape = 'x'.join(map(str, leaf.shape))
    axes = (','.join(axis or '-' for axis in s.spec) for s in row)
    rows.append((name, shape, *(spec or 'whole' for spec in axes)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ''.join(
    '  '.join(map(str.ljust, row, widths)).rstrip() + '\n' for row in rows
  )


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  for recipe in RECIPES:
    text = describe_shardings(build_abstract_state(recipe))
    (GOLDEN / f'{recipe}.txt').write_text(text)
