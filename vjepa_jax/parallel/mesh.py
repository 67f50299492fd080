"""The device mesh: axes `data` and `fsdp`, nothing else."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from vjepa_jax.errors import UserError


def make_mesh(
  fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Makes the mesh of all devices.

  Several TPU slices are joined along `data`: an fsdp group stays inside one
  slice, whose network is many times faster than the one between slices.

  Args:
    fsdp: Devices in a group that shares one copy of the state; the rest of the
      mesh is data-parallel. Small groups (8, 16) inside one host's fast
      network serve better than all devices.
    devices: Defaults to all devices of all processes.

  Returns:
    A mesh of shape (data, fsdp).

  Raises:
    UserError: The devices do not split into groups of `fsdp`.
  """
  devices = jax.devices() if devices is None else devices
  num_slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if fsdp < 1 or (len(devices) // num_slices) % fsdp:
    slices = f' in each of {num_slices} slices' if num_slices > 1 else ''
    raise UserError(
      f'{len(devices) // num_slices} devices{slices} do not split into fsdp '
      f'groups of {fsdp}: set config.fsdp to a divisor of the number of devices'
    )
  shape = len(devices) // num_slices // fsdp, fsdp
  # A torus need not have an axis of the length that is asked for.
  if num_slices > 1:
    array = mesh_utils.create_hybrid_device_mesh(
      shape, (num_slices, 1), devices, allow_split_physical_axes=True
    )
  else:
    array = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  # Auto, said explicitly: under Explicit axes Flax's scan over partitioned
  # parameters fails.
  return Mesh(array, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def get_platform(mesh: Mesh) -> str:
  """Returns 'cpu', 'gpu' or 'tpu': what its devices are, attached or not."""
  return mesh.devices.flat[0].platform
