"""Accelerators that are not attached, to compile for ahead of time."""

from collections.abc import Sequence
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
  """What is known of one device of a kind.

  Attributes:
    hbm: Memory that XLA may use, GiB.
    flops: Peak of bfloat16 matmuls, FLOP/s.
    clock: Of the cycles that XLA estimates, Hz.
    bandwidth: Between chips of a slice, bytes/s.
  """

  hbm: float
  flops: float
  clock: float
  bandwidth: float


# Memory: what the compiler says when it runs out. Peaks: the vendor's figures.
# Bandwidth: of a ring over two dimensions of the slice's network.
CHIPS = {
  'v4': Chip(30.75, 275e12, 1.05e9, 270e9),
  'v5e': Chip(15.75, 197e12, 1.5e9, 180e9),
  'v5p': Chip(95.73, 459e12, 1.75e9, 540e9),
  'v6e': Chip(31.24, 918e12, 1.75e9, 360e9),
  'tpu7x': Chip(94.74, 1153e12, 1.9e9, 540e9),
}

# libtpu asks a metadata server and takes a lock for the chips of its machine;
# here it has neither chips nor a server, and several may compile at a time.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


def get_chip(topology: str) -> Chip:
  """Returns the facts of a topology's devices, such as 'v5e:16x16'.

  Raises:
    ValueError: The kind of chip is not known; the message lists them.
  """
  kind = topology.partition(':')[0]
  if kind not in CHIPS:
    raise ValueError(
      f'topology {topology!r} is not KIND:SHAPE with KIND one of '
      f'{", ".join(CHIPS)}, such as v5e:16x16 or v5p:4x4x8'
    )
  return CHIPS[kind]


def get_devices(topology: str, num_slices: int = 1) -> Sequence[jax.Device]:
  """Describes the TPU devices of a topology, none of which need be attached.

  Args:
    topology: Kind and shape of a slice, such as 'v5e:16x16' or 'v5p:4x4x8'.
    num_slices: Slices joined by the data centre's network.

  Returns:
    Devices that a mesh can be made of and a program be compiled for. The
    process must not use attached TPUs (run it with JAX_PLATFORMS=cpu).

  Raises:
    RuntimeError: libtpu is not installed.
    ValueError: There is no such topology.
  """
  kind = topology.partition(':')[0]
  get_chip(topology)
  os.environ.update(_ENVIRONMENT)
  # One device a chip, as programs on a v4 see it.
  options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  if num_slices > 1:
    options['num_slices'] = num_slices
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options
    ).devices
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    if 'libtpu' in str(error) or isinstance(error, NotImplementedError):
      raise RuntimeError(
        "compiling for TPUs needs libtpu: pip install -e '.[tpu]'"
      ) from error
    raise ValueError(f'topology {topology!r}: {error}') from error
