"""Accelerators that are not attached, to compile for ahead of time."""

from collections.abc import Sequence
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from vjepa_jax.errors import UserError


class Chip(NamedTuple):
  """What is known of one device of a kind."""

  hbm: float  # memory that XLA may use, GiB
  flops: float  # peak of bfloat16 matmuls, FLOP/s
  clock: float | None  # of the cycles that XLA estimates, Hz
  bandwidth: float  # between chips of a slice, bytes/s


# Memory of a TPU: what the compiler says when it runs out. Peaks: the vendors'
# figures without sparsity. Bandwidth: of a ring over two dimensions of a TPU
# slice, of NVLink. XLA:GPU estimates no cycles.
CHIPS = {
  'v4': Chip(30.75, 275e12, 1.05e9, 270e9),
  'v5e': Chip(15.75, 197e12, 1.5e9, 180e9),
  'v5p': Chip(95.73, 459e12, 1.75e9, 540e9),
  'v6e': Chip(31.24, 918e12, 1.75e9, 360e9),
  'tpu7x': Chip(94.74, 1153e12, 1.9e9, 540e9),
  'h100': Chip(79.1, 989e12, None, 450e9),
  'h200': Chip(140.4, 989e12, None, 450e9),
}

# What XLA:GPU asks a device for, as a GpuTargetConfigProto.
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
_GPUS = {
  'h100': dict(
    name='NVIDIA H100 80GB HBM3',
    bandwidth=3352320000000,
    memory=84978565120,
  ),
  'h200': dict(
    name='NVIDIA H200', bandwidth=4800000000000, memory=150754820096
  ),
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
    UserError: The kind of chip is not known; the message lists them.
  """
  kind = topology.partition(':')[0]
  if kind not in CHIPS:
    raise UserError(
      f'topology {topology!r} is not KIND:SHAPE with KIND one of '
      f'{", ".join(CHIPS)}, such as v5e:16x16 or v5p:4x4x8'
    )
  return CHIPS[kind]


def get_devices(topology: str, num_slices: int = 1) -> Sequence[jax.Device]:
  """Describes the devices of a topology, none of which need be attached.

  Args:
    topology: Kind and shape: of a TPU slice 'v5e:16x16' or 'v5p:4x4x8', of
      GPUs 'h100:1x1x8' (slices x hosts x GPUs a host).
    num_slices: TPU slices joined by the data centre's network.

  Returns:
    Devices that a mesh can be made of and a program be compiled for. The
    process cannot use attached devices: it is set to the CPU platform.

  Raises:
    UserError: The compiler (libtpu, or jax's CUDA plugin) is not installed.
    UserError: There is no such topology.
  """
  kind, _, shape = topology.partition(':')
  get_chip(topology)
  jax.config.update('jax_platforms', 'cpu')
  if kind in _GPUS:
    extra, arguments = 'cuda', ('h100', 'cuda')
    target = _GPU_TARGET.format(**_GPUS[kind])
    options = {'target_config': target, 'topology': shape}
  else:
    extra, arguments = 'tpu', (topology, 'tpu')
    os.environ.update(_ENVIRONMENT)
    # One device a chip, as programs on a v4 see it.
    options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
    if num_slices > 1:
      options['num_slices'] = num_slices
  try:
    return topologies.get_topology_desc(*arguments, **options).devices
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    raise UserError(f'topology {topology!r}: {error}') from error
  except (NotImplementedError, RuntimeError) as error:
    raise UserError(
      f"compiling for {kind} needs another extra: pip install -e '.[{extra}]'"
    ) from error
