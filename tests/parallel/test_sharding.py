"""Mesh and sharding rule."""

import difflib

import dump_shardings
from dump_shardings import RECIPES
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding


def _specs(shapes, fsdp):
  tree = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in shapes.items()
  }
  shardings = sharding.shard_tree(tree, mesh_lib.make_mesh(fsdp))
  return {name: s.spec for name, s in shardings.items()}


def test_mesh_has_data_and_fsdp_axes():
  mesh = mesh_lib.make_mesh(2)
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 2}
  assert mesh_lib.get_platform(mesh) == 'cpu'
  with pytest.raises(ValueError, match='8 devices do not split into fsdp gro'):
    mesh_lib.make_mesh(3)


def test_rule_takes_the_largest_divisible_dimension():
  shapes = {
    'wide': (1024, 4096),
    'tall': (4096, 1024),
    'odd': (1023, 4096),
    'none': (1023, 2049),
    'small': (1024, 1020),  # a little less than 4 MiB
    # The depth of scanned layers is left alone, and does not count.
    'blocks/kernel': (4096, 1024, 8, 128),
    'blocks/small': (4096, 64, 8, 64),
    'predictor/blocks/kernel': (12, 384, 1536),
  }
  split = {name: P(None, 'fsdp') for name in ('wide', 'odd', 'blocks/kernel')}
  whole = {n: P() for n in shapes.keys() - split.keys()}
  assert _specs(shapes, fsdp=4) == split | whole | {'tall': P('fsdp')}
  assert set(_specs(shapes, fsdp=1).values()) == {P()}


def test_guard_names_what_is_not_sharded_and_matters():
  mesh = dump_shardings.make_abstract_mesh(8)

  def check(dtype, **shapes):
    tree = {k: jax.ShapeDtypeStruct(v, dtype) for k, v in shapes.items()}
    shardings = sharding.shard_tree(tree, mesh)
    sharding.check_sufficiently_sharded(tree, shardings, mesh)

  good, bad = (2**15, 2**15), (16385, 16385)
  with pytest.raises(
    ValueError, match='1.0 GiB of the state .* most of it bad'
  ):
    check(jnp.float32, good=good, bad=bad)
  check(jnp.float32, good=good)
  check(jnp.bfloat16, bad=bad)


def test_global_batch_keeps_the_order_of_rows():
  mesh = mesh_lib.make_mesh(2)
  rows = sharding.shard_batch(mesh)
  batch = {'video': np.arange(16 * 3).reshape(16, 3)}
  array = sharding.make_global(batch, rows)['video']
  np.testing.assert_array_equal(array, batch['video'])
  assert array.addressable_shards[0].data.shape == (2, 3)


@pytest.fixture(scope='module')
def states():
  return {n: dump_shardings.build_abstract_state(n) for n in RECIPES}


@pytest.mark.parametrize('recipe', RECIPES)
def test_layout_of_every_recipe_is_as_written_down(recipe, states):
  text = dump_shardings.describe_shardings(states[recipe])
  golden = dump_shardings.GOLDEN / f'{recipe}.txt'
  difference = '\n'.join(
    difflib.unified_diff(
      golden.read_text().splitlines(),
      text.splitlines(),
      f'written in {golden.name}',
      'computed now',
      lineterm='',
      n=0,
    )
  )
  assert not difference, (
    f'{difference}\n\nif it shall be so: python tests/parallel/'
    'dump_shardings.py'
  )


@pytest.mark.parametrize('fsdp', dump_shardings.FSDP)
@pytest.mark.parametrize('recipe', RECIPES)
def test_every_recipe_is_sufficiently_sharded(recipe, fsdp, states):
  mesh, state = dump_shardings.make_abstract_mesh(fsdp), states[recipe]
  shardings = sharding.shard_tree(state, mesh)
  sharding.check_sufficiently_sharded(state, shardings, mesh)
  # Moments and target lie where their parameters do.
  for tree in (shardings.opt_state.mu, shardings.opt_state.nu):
    assert tree == shardings.params
  assert shardings.target == shardings.params['encoder']
  # The same in other words: what one device holds, of the whole.
  whole, predictor = (
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    for tree in (state, state.params['predictor'])
  )
  held = sharding.count_bytes(state, shardings)
  assert held < whole / fsdp + 3 * predictor + 0.02 * whole
