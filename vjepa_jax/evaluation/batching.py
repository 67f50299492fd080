"""Runs a function over many rows, in batches of one shape, on all devices."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

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
  apply: Apply, mesh: Mesh, batch_size: int, setting: str
) -> Callable[[Any, Iterable[Any]], Iterator[Any]]:
  """Makes the function (parameters, batches) -> the result of each batch.

  All batches have one shape, so that there is one program: short ones are
  filled up with zeros. While one is on the devices, the next is put together.

  Args:
    apply: Maps parameters and a tree of arrays `[batch_size, ...]` to another.
    mesh: Batches are split over all its devices.
    batch_size: Rows at a time, over all hosts of the mesh.
    setting: Says in an error where the batch size comes from.

  Returns:
    A function that takes this host's rows of each batch, and yields on every
    host host arrays of the whole, `[batch_size, ...]`.

  Raises:
    ValueError: The batch does not split evenly over the devices.
  """
  num_devices = mesh.devices.size
  if batch_size % num_devices:
    raise ValueError(
      f'{setting} {batch_size} is not divisible by {num_devices} devices: '
      'change it'
    )
  rows = sharding.shard_batch(mesh)
  # Several hosts need what the others computed; one has it all.
  out = rows if rows.is_fully_addressable else sharding.replicate(mesh)
  compiled = jax.jit(apply, out_shardings=out)
  per_host = batch_size * len(mesh.local_devices) // num_devices

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
        yield jax.device_get(before)
    if running is not None:
      yield jax.device_get(running)

  return map_batches


def get_own_rows(batch_size: int) -> range:
  """Returns which rows of a batch over all hosts are this host's."""
  per_host = batch_size // jax.process_count()
  first = jax.process_index() * per_host
  return range(first, first + per_host)


def make_extract(
  apply: Apply, mesh: Mesh, batch_size: int, setting: str
) -> Callable[[Any, np.ndarray], np.ndarray]:
  """Makes the function (parameters, rows in memory) -> their results.

  Every host passes all rows and gets all results. For arguments and errors see
  `make_map_batches`.
  """
  map_batches = make_map_batches(apply, mesh, batch_size, setting)
  own = get_own_rows(batch_size)

  def extract(params, rows):
    batches = (
      rows[start + own.start : start + own.stop]
      for start in range(0, len(rows), batch_size)
    )
    return np.concatenate(list(map_batches(params, batches)))[: len(rows)]

  return extract
