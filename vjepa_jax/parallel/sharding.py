"""Shardings of state and batch by one small rule on shapes and paths."""

from collections.abc import Callable
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vjepa_jax.errors import UserError

# Sharding something smaller costs more in collectives than it saves: norms,
# biases, and the predictor, whose state is a quarter of a GiB.
MIN_SHARDED_BYTES = 4 * 2**20
# Parameters under these names are stacked over depth by a scan.
_SCANNED = re.compile(r'(^|/)blocks/')
_MAX_WHOLE_GIB = 1.0
_ROWS = PartitionSpec(('data', 'fsdp'))


def replicate(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def shard_batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches: the first axis over all devices."""
  return NamedSharding(mesh, _ROWS)


def _name_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by their paths, 'params/encoder/norm/bias'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _choose_spec(path: str, leaf: Any, fsdp: int) -> PartitionSpec:
  """Chooses the largest dimension that `fsdp` divides, the depth axis aside."""
  first = 1 if _SCANNED.search(path) else 0
  num_bytes = math.prod(leaf.shape[first:]) * leaf.dtype.itemsize
  if fsdp > 1 and num_bytes >= MIN_SHARDED_BYTES:
    for axis in sorted(range(first, leaf.ndim), key=lambda i: -leaf.shape[i]):
      if leaf.shape[axis] % fsdp == 0:
        return PartitionSpec(*([None] * axis), 'fsdp')
  return PartitionSpec()


def shard_tree(tree: Any, mesh: Mesh) -> Any:
  """Computes the sharding of every leaf of a state tree.

  Leaves of less than `MIN_SHARDED_BYTES`, of a stack the layers of it, are
  replicated.

  Args:
    tree: Arrays or what `jax.eval_shape` returns for them: parameters,
      optimizer moments and the target share one rule, since their leaves have
      the same shapes at the end of the same paths.
    mesh: Mesh with an axis `fsdp`.

  Returns:
    The tree with a NamedSharding for each leaf.
  """
  shardings = [
    NamedSharding(mesh, _choose_spec(path, leaf, mesh.shape['fsdp']))
    for path, leaf in _name_leaves(tree).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(tree), shardings)


def count_bytes(tree: Any, shardings: Any) -> int:
  """Counts the bytes of a tree that one device holds."""
  return sum(
    math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, place in zip(
      jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
    )
  )


def check_sufficiently_sharded(tree: Any, shardings: Any, mesh: Mesh) -> None:
  """Checks what `shard_tree` returned for an abstract state.

  Raises:
    UserError: With fsdp, more than 1 GiB is whole on every device; the largest
      leaves are named.
  """
  places = jax.tree.leaves(shardings)
  whole = {
    path: leaf.size * leaf.dtype.itemsize / 2**30
    for (path, leaf), place in zip(
      _name_leaves(tree).items(), places, strict=True
    )
    if place.is_fully_replicated
  }
  if mesh.shape['fsdp'] > 1 and sum(whole.values()) > _MAX_WHOLE_GIB:
    largest = sorted(whole, key=whole.get, reverse=True)[:3]
    raise UserError(
      f'{sum(whole.values()):.1f} GiB of the state are not sharded over fsdp='
      f'{mesh.shape["fsdp"]} (at most {_MAX_WHOLE_GIB:g} may be), most of it '
      f'{", ".join(largest)}: choose fsdp so that it divides the widths'
    )


def constrain_batch(x: jax.Array) -> jax.Array:
  """Keeps activations `[B, ...]` split by rows, where a mesh is set.

  Without it the partitioner may split activations by features, to match the
  parameters, and copy them around. Under `jax.set_mesh` only.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, _ROWS)


def take_part(batch: Any, index: jax.Array | int, count: int) -> Any:
  """Takes one of `count` parts of a batch, a tree of arrays `[B, ...]`.

  Row r is in part r % count: each device has its share of the rows of a part,
  and none is moved. Scanning over an index copies a part at a time, scanning
  over the parts would copy the batch.

  Returns:
    The tree with arrays `[B / count, ...]`.
  """

  def take(x):
    rows = constrain_batch(x.reshape(-1, count, *x.shape[1:]))
    return jax.lax.dynamic_index_in_dim(rows, index, axis=1, keepdims=False)

  return jax.tree.map(take, batch)


def map_rows(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Runs a function on the rows that each device holds.

  The partitioner does not look into a Pallas kernel; here it need not. Where
  no mesh is set, the function is run as it is.

  Args:
    function: Of arrays `[B, ...]`, or `[1, ...]` for what all rows share, to
      an array `[B, ...]`.
  """

  def mapped(*arrays):
    if jax.sharding.get_abstract_mesh().empty:
      return function(*arrays)
    specs = tuple(PartitionSpec() if len(a) == 1 else _ROWS for a in arrays)
    # Kernels do not say how their results vary over the mesh.
    return jax.shard_map(
      function, in_specs=specs, out_specs=_ROWS, check_vma=False
    )(*arrays)

  return mapped


def make_global(batch: Any, sharding: NamedSharding) -> Any:
  """Assembles the global batch from the rows that each process holds.

  Takes a tree of host arrays `[B / processes, ...]`, and a sharding over the
  first axis; returns the tree as global jax.Arrays `[B, ...]`.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, np.ascontiguousarray(x)
    ),
    batch,
  )
