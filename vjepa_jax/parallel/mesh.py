"""The device mesh: axes `data` and `fsdp`, nothing else."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh


def make_mesh(
  fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Makes the mesh of all devices.

  Args:
    fsdp: Devices in a group that shares one copy of the state; the rest of the
      mesh is data-parallel. Small groups (8, 16) inside one host's fast
      network serve better than all devices.
    devices: Defaults to all devices of all processes.

  Returns:
    A mesh of shape (data, fsdp).

  Raises:
    ValueError: The devices do not split into groups of `fsdp`.
  """
  devices = jax.devices() if devices is None else devices
  if fsdp < 1 or len(devices) % fsdp:
    raise ValueError(
      f'{len(devices)} devices do not split into fsdp groups of {fsdp}: set '
      'config.fsdp to a divisor of the number of devices'
    )
  # Auto, said explicitly: make_mesh's default became Explicit, under which
  # Flax's scan over partitioned parameters fails.
  return jax.make_mesh(
    (len(devices) // fsdp, fsdp),
    ('data', 'fsdp'),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )


def get_platform(mesh: Mesh) -> str:
  """Returns 'cpu', 'gpu' or 'tpu': what the mesh's devices are.

  Kernels are chosen by this, never by the default backend, so that a step can
  be compiled for devices that are not attached.
  """
  return mesh.devices.flat[0].platform
