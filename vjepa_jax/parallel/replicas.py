"""Copies of the state on several groups of hosts: one reads it, all have it."""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np


def split_replicas(mesh: Mesh) -> Mesh | None:
  """Splits a mesh into groups of whole hosts that hold a copy each.

  Args:
    mesh: See `make_mesh`; its first axis only holds copies.

  Returns:
    The same devices in the same order, with an axis 'replica' before the
    others, as long as it can be; None if that is 1.
  """
  rows, columns = mesh.devices.shape
  hosts = [[d.process_index for d in row] for row in mesh.devices]
  size = choose_rows(np.array(hosts))
  if size == rows:
    return None
  names, kinds = ('replica', *mesh.axis_names), mesh.axis_types
  groups = mesh.devices.reshape(rows // size, size, columns)
  return Mesh(groups, names, axis_types=(kinds[0], *kinds))


def choose_rows(hosts: np.ndarray) -> int:
  """Chooses how many rows make the smallest group of whole hosts.

  Args:
    hosts: Which host each device of a mesh is of, int `[data, fsdp]`.
  """
  rows, count = len(hosts), len(np.unique(hosts))
  for size in range(1, rows):
    if rows % size == 0:
      groups = hosts.reshape(rows // size, -1)
      if sum(len(np.unique(group)) for group in groups) == count:
        return size  # none is in two groups
  return rows


def place_on_first(wanted: Any, replicas: Mesh) -> Any | None:
  """Places shapes on the first replica; None where this host is not of it."""
  first = Mesh(replicas.devices[0], replicas.axis_names[1:])
  if jax.process_index() not in {d.process_index for d in first.devices.flat}:
    return None
  return jax.tree.map(
    lambda x: x.update(sharding=NamedSharding(first, x.sharding.spec)), wanted
  )


def measure_readers(tree: Any, shardings: Any, mesh: Mesh) -> dict[str, float]:
  """Measures how a state is read: by one replica, which sends it to the others.

  Args:
    tree: The state, or its shapes.
    shardings: Of its leaves.
    mesh: Their mesh, of devices that need not be attached.

  Returns:
    The number of hosts, the slices that they are in, and what each reads, GiB.
  """
  replicas = split_replicas(mesh)
  devices = mesh.devices if replicas is None else replicas.devices[0]
  readers = list(devices.flat)
  own = [d for d in readers if d.process_index == readers[0].process_index]

  def measure(leaf, place):
    parts = place.devices_indices_map(leaf.shape)
    count = len({str(parts[device]) for device in own})
    size = math.prod(place.shard_shape(leaf.shape))
    return count * size * leaf.dtype.itemsize

  sizes = jax.tree.leaves(jax.tree.map(measure, tree, shardings))
  return {
    'hosts': len({device.process_index for device in readers}),
    'slices': len({getattr(device, 'slice_index', 0) for device in readers}),
    'gib_a_host': sum(sizes) / 2**30,
  }


def broadcast(tree: Any | None, wanted: Any, replicas: Mesh) -> Any:
  """Sends what the first replica has to all.

  Args:
    tree: Arrays as `place_on_first` placed them; None on other hosts.
    wanted: Shapes, and where they shall go.
    replicas: What `split_replicas` returned.
  """

  def send(shape, array):
    spec = PartitionSpec('replica', *shape.sharding.spec)
    own = {}
    if array is not None:
      own = {shard.device: shard.data for shard in array.addressable_shards}
    part = shape.sharding.shard_shape(shape.shape)
    parts = [
      own[device][None]
      if device in own
      else jax.device_put(np.zeros((1, *part), shape.dtype), device)
      for device in replicas.local_devices
    ]
    return _add_replicas(shape.sharding)(
      jax.make_array_from_single_device_arrays(
        (len(replicas.devices), *shape.shape),
        NamedSharding(replicas, spec),
        parts,
      )
    )

  if tree is None:
    return jax.tree.map(lambda shape: send(shape, None), wanted)
  return jax.tree.map(send, wanted, tree)


@functools.cache
def _add_replicas(out: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  """Makes the sum over replicas, all but one of which are 0."""

  def add(x):
    # As integers: -0.0 + 0.0 is 0.0.
    whole = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
    bits = jax.lax.bitcast_convert_type(x, whole)
    bits = bits.sum(axis=0, dtype=whole)
    return jax.lax.bitcast_convert_type(bits, x.dtype)

  return jax.jit(add, out_shardings=out)
