"""Mesh and sharding rule."""

import difflib
import math

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
    'odd': (1023, 512),
    'none': (1023, 513),
    'small': (64,),
    # The depth of scanned layers is left alone.
    'transformer/blocks/kernel': (4096, 64, 8, 64),
  }
  split = {name: P(None, 'fsdp') for name in shapes}
  assert _specs(shapes, fsdp=4) == split | {
    'tall': P('fsdp'),
    'none': P(),
    'small': P(),
  }
  assert set(_specs(shapes, fsdp=1).values()) == {P()}


def test_guard_names_what_is_not_sharded_and_matters():
  mesh = dump_shardings.make_abstract_mesh(8)

  def check(dtype, **shapes):
    tree = {k: jax.ShapeDtypeStruct(v, dtype) for k, v in shapes.items()}
    shardings = sharding.shard_tree(tree, mesh)
    sharding.check_sufficiently_sharded(tree, shardings, mesh)

  with pytest.raises(ValueError, match='21.0% of the state .* most of it bad'):
    check(jnp.float32, good=(1024, 4096), bad=(1001, 1111))
  check(jnp.float32, good=(1024, 4096))
  check(jnp.bfloat16, bad=(1001, 1111))


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
  leaves, places = jax.tree.leaves(state), jax.tree.leaves(shardings)
  whole = sum(x.size for x in leaves)
  held = sum(
    math.prod(place.shard_shape(x.shape))
    for x, place in zip(leaves, places, strict=True)
  )
  assert held < whole / fsdp + 0.02 * whole
