"""Runs a function over many rows, in batches of one shape, on all devices."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel import sharding

Apply = Callable[[Any, Any], Any]


def apply_encoder(
  encoder: Encoder, *, pool: bool = False, dtype: str = 'float32'
) -> Apply:
  """Makes the function (parameters, clips) -> features `[B, N, D]`.

  With `pool` they are the mean over tokens `[B, D]`, taken in float32.
  """

  def apply(params, videos):
    features = encoder.apply({'params': params}, videos)
    if pool:
      features = features.astype(jnp.float32).mean(axis=1)
    return features.astype(dtype)

  return apply


def make_map_batches(
  apply: Apply, mesh: Mesh, batch_size: int, setting: str, out: Any = None
) -> Callable[[Any, Iterable[Any]], Iterator[Any]]:
  """Makes the function (parameters, batches) -> the result of each batch.

  All batches have one shape, so that there is one program: short ones are
  filled up with zeros. While one is on the devices, the next is put together.

  Args:
    apply: Maps parameters and a tree of arrays `[batch_size, ...]` to another.
    mesh: Batches are split over all its devices.
    batch_size: Rows at a time, over all hosts of the mesh.
    setting: Says in an error where the batch size comes from.
    out: Shardings of the result, a prefix of its tree; None for what `fetch`
      gives every host whole.

  Returns:
    A function that takes this host's rows of each batch, see `get_own_rows`,
    and yields arrays `[batch_size, ...]` on the devices, for `fetch`.

  Raises:
    UserError: The batch does not split evenly over the devices.
  """
  num_devices = mesh.devices.size
  if batch_size % num_devices:
    raise UserError(
      f'{setting} {batch_size} is not divisible by {num_devices} devices: '
      'change it'
    )
  rows = sharding.shard_batch(mesh)
  if out is None:
    # Several hosts need what the others computed; one has it all.
    out = rows if rows.is_fully_addressable else sharding.replicate(mesh)
  compiled = jax.jit(apply, out_shardings=out)
  per_host = len(get_own_rows(mesh, batch_size))

  def pad(x):
    missing = per_host - len(x)
    return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x

  def map_batches(params, batches):
    running = None
    for batch in batches:
      batch = sharding.make_global(jax.tree.map(pad, batch), rows)
      # A Pallas kernel is split over the devices by the mesh that is set.
      with jax.set_mesh(mesh):
        before, running = running, compiled(params, batch)
      if before is not None:
        yield before
    if running is not None:
      yield running

  return map_batches


def fetch(tree: Any) -> Any:
  """Copies arrays to the host; of those split over hosts, its own rows."""

  def get(x):
    if x.is_fully_addressable or x.is_fully_replicated:
      return x
    own = {shard.index[0].start: shard.data for shard in x.addressable_shards}
    return np.concatenate([own[start] for start in sorted(own)])

  return jax.device_get(jax.tree.map(get, tree))


def get_own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Returns which rows of a batch over all hosts are this host's.

  On a torus they need not lie side by side: devices are in the order of their
  places, not of their hosts.
  """
  rows = sharding.shard_batch(mesh)
  own = rows.addressable_devices_indices_map((batch_size,)).values()
  return np.unique([np.arange(batch_size)[index] for index in own])


def make_extract(
  apply: Apply, mesh: Mesh, batch_size: int, setting: str
) -> Callable[[Any, np.ndarray], np.ndarray]:
  """Makes the function (parameters, rows in memory) -> their results.

  Every host passes all rows and gets all results. For arguments and errors see
  `make_map_batches`.
  """
  map_batches = make_map_batches(apply, mesh, batch_size, setting)
  own = get_own_rows(mesh, batch_size)

  def extract(params, rows):
    starts = range(0, len(rows), batch_size)
    batches = (rows[start + own[start + own < len(rows)]] for start in starts)
    results = map(fetch, map_batches(params, batches))
    return np.concatenate(list(results))[: len(rows)]

  return extract
