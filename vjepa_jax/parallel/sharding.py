"""Shardings of state and batch by one small rule on shapes and paths."""

from collections.abc import Callable
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from vjepa_jax.errors import UserError

# Sharding something smaller costs more in collectives than it saves.
MIN_SHARDED_ELEMENTS = 2**13
# Parameters under these names are stacked over depth by a scan.
_SCANNED = re.compile(r'(^|/)blocks/')
_MAX_UNSHARDED = 0.02
_ROWS = PartitionSpec(('data', 'fsdp'))
# Below this many bytes nobody minds: a toy model fits whole.
_ALWAYS_FITS = 2**22


def replicate(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def shard_batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches: the first axis over all devices."""
  return NamedSharding(mesh, _ROWS)


def _choose_spec(
  path: str, shape: tuple[int, ...], fsdp: int, min_elements: int
) -> PartitionSpec:
  """Chooses the largest dimension that `fsdp` divides, the depth axis aside."""
  first = 1 if _SCANNED.search(path) else 0
  if math.prod(shape[first:]) < min_elements:
    return PartitionSpec()
  for axis in sorted(range(first, len(shape)), key=lambda i: -shape[i]):
    if shape[axis] % fsdp == 0:
      return PartitionSpec(*([None] * axis), 'fsdp')
  return PartitionSpec()


def shard_tree(
  tree: Any, mesh: Mesh, min_elements: int = MIN_SHARDED_ELEMENTS
) -> Any:
  """Computes the sharding of every leaf of a state tree.

  Args:
    tree: Arrays or what `jax.eval_shape` returns for them: parameters,
      optimizer moments and the target share one rule, since their leaves have
      the same shapes at the end of the same paths.
    mesh: Mesh with an axis `fsdp`.
    min_elements: Leaves that are smaller, of a stack the layers of it, are
      replicated.

  Returns:
    The tree with a NamedSharding for each leaf.
  """

  def choose(path, leaf):
    if mesh.shape['fsdp'] == 1:
      return replicate(mesh)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(
      mesh, _choose_spec(name, leaf.shape, mesh.shape['fsdp'], min_elements)
    )

  return jax.tree_util.tree_map_with_path(choose, tree)


def check_sufficiently_sharded(tree: Any, shardings: Any, mesh: Mesh) -> None:
  """Checks what `shard_tree` returned for an abstract state.

  Raises:
    UserError: More than 2 % of the bytes are left whole everywhere; the largest
      leaves are named.
  """
  if mesh.shape['fsdp'] == 1:
    return
  sizes, total = {}, 0
  for (path, leaf), sharding in zip(
    jax.tree_util.tree_leaves_with_path(tree),
    jax.tree.leaves(shardings),
    strict=True,
  ):
    num_bytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    total += num_bytes
    if sharding.is_fully_replicated:
      sizes[jax.tree_util.keystr(path, simple=True, separator='/')] = num_bytes
  share = sum(sizes.values()) / total
  if share > _MAX_UNSHARDED and sum(sizes.values()) > _ALWAYS_FITS:
    largest = sorted(sizes, key=sizes.get, reverse=True)[:3]
    raise UserError(
      f'{share:.1%} of the state is not sharded over fsdp='
      f'{mesh.shape["fsdp"]} (at most {_MAX_UNSHARDED:.0%} may be), most of '
      f'it {", ".join(largest)}: choose fsdp so that it divides the widths'
    )


def constrain_batch(x: jax.Array) -> jax.Array:
  """Keeps activations `[B, ...]` split by rows, where a mesh is set.

  Without it the partitioner may split activations by features, to match the
  parameters, and copy them around. Under `jax.set_mesh` only.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, _ROWS)


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
