"""Devices and flags for all tests."""

from absl import flags
import jax

# Before the first use of jax: tests of sharding need several devices.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Grain reads absl flags; pytest parses its own.
flags.FLAGS.mark_as_parsed()
