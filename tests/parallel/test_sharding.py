"""Mesh and sharding rule."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding


def _specs(shapes, fsdp, **options):
  mesh = mesh_lib.make_mesh(fsdp)
  tree = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in shapes.items()
  }
  shardings = sharding.shard_tree(tree, mesh, **options)
  return {name: s.spec for name, s in shardings.items()}


def test_mesh_has_data_and_fsdp_axes():
  mesh = mesh_lib.make_mesh(2)
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 2}
  assert mesh_lib.get_platform(mesh) == 'cpu'
  with pytest.raises(ValueError, match='8 devices do not split into fsdp gro'):
    mesh_lib.make_mesh(3)


def test_rule_takes_the_largest_divisible_dimension():
  specs = _specs(
    {
      'wide': (1024, 4096),
      'tall': (4096, 1024),
      'odd': (1023, 512),
      'none': (1023, 513),
      'small': (64,),
    },
    fsdp=4,
  )
  assert specs == {
    'wide': P(None, 'fsdp'),
    'tall': P('fsdp'),
    'odd': P(None, 'fsdp'),
    'none': P(),
    'small': P(),
  }


def test_rule_leaves_the_scanned_depth_alone():
  mesh = mesh_lib.make_mesh(4)
  kernel = jax.ShapeDtypeStruct((4096, 64, 8, 64), jnp.float32)
  tree = {'transformer': {'blocks': {'query': {'kernel': kernel}}}}
  spec = jax.tree.leaves(sharding.shard_tree(tree, mesh))[0].spec
  assert spec == P(None, 'fsdp')


def test_without_fsdp_everything_is_replicated():
  assert _specs({'a': (1024, 4096)}, fsdp=1) == {'a': P()}


def test_guard_names_what_is_not_sharded():
  mesh = mesh_lib.make_mesh(8)
  tree = {
    'good': jax.ShapeDtypeStruct((1024, 4096), jnp.float32),
    'bad': jax.ShapeDtypeStruct((1001, 1111), jnp.float32),
  }
  shardings = sharding.shard_tree(tree, mesh)
  with pytest.raises(ValueError, match='21.0% of the state .* most of it bad'):
    sharding.check_sufficiently_sharded(tree, shardings, mesh)
  del tree['bad'], shardings['bad']
  sharding.check_sufficiently_sharded(tree, shardings, mesh)


def test_global_batch_keeps_the_order_of_rows():
  mesh = mesh_lib.make_mesh(2)
  rows = sharding.shard_batch(mesh)
  batch = {'video': np.arange(16 * 3).reshape(16, 3)}
  array = sharding.make_global(batch, rows)['video']
  np.testing.assert_array_equal(array, batch['video'])
  assert array.addressable_shards[0].data.shape == (2, 3)
