"""Which hosts read a checkpoint; that all have it, test_hosts.py shows."""

import numpy as np
import pytest

from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.parallel.replicas import choose_rows, split_replicas

# A torus of 4 x 4 chips, four of a host, in the order of a mesh.
_TORUS = np.kron([[0, 1], [2, 3]], np.ones((2, 2), int)).ravel()


@pytest.mark.parametrize(
  'hosts,fsdp,rows',
  [
    (np.repeat(np.arange(4), 4), 1, 4),  # four replicas of a host each
    (np.repeat(np.arange(4), 4), 2, 2),
    (np.repeat(np.arange(4), 4), 8, 1),  # two of two hosts
    (np.repeat(np.arange(4), 4), 16, 1),  # one
    (_TORUS, 1, 8),  # two halves of it
    (np.zeros(8, int), 2, 4),  # one host reads for itself
  ],
)
def test_a_replica_is_of_whole_hosts(hosts, fsdp, rows):
  assert choose_rows(hosts.reshape(-1, fsdp)) == rows


def test_one_host_has_one_replica():
  assert split_replicas(make_mesh(2)) is None
