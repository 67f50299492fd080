"""What processes check before they start together."""

import json
from types import SimpleNamespace

import jax
import pytest

from vjepa_jax.parallel import hosts


def _answer(monkeypatch, answer):
  """Lets two processes gather: this one, and one that answers it."""
  monkeypatch.setattr(hosts, 'gather', lambda text: [text, answer(text)])


@pytest.mark.parametrize(
  'change,message',
  [
    ({'config': {'fsdp': 4}}, 'process 1 has config.fsdp 4, process 0 has 8'),
    ({'config': {}}, 'process 1 has config.fsdp None, process 0 has 8'),
    ({'code': 'abc'}, 'process 1 has code abc, process 0 has '),
    ({'jax': '0.1'}, 'process 1 has jax 0.1, process 0 has '),
  ],
)
def test_the_first_difference_is_named(monkeypatch, change, message):
  facts = {'config': {'fsdp': 8}}
  _answer(monkeypatch, str)
  hosts.check_agreement(facts)
  _answer(monkeypatch, lambda text: json.dumps(json.loads(text) | change))
  with pytest.raises(ValueError, match=message):
    hosts.check_agreement(facts)


def test_every_process_needs_the_same_devices(monkeypatch):
  hosts.check_devices()
  devices = [
    SimpleNamespace(process_index=process, device_kind='cpu')
    for process in (0, 0, 1)
  ]
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  with pytest.raises(ValueError, match='process 1 has 1 devices .cpu., proces'):
    hosts.check_devices()


def test_every_process_must_see_the_workdir(monkeypatch, tmp_path):
  _answer(monkeypatch, str)
  hosts.check_shared(tmp_path / 'run')
  _answer(monkeypatch, lambda text: text.replace('True', 'False'))
  with pytest.raises(ValueError, match='run of process 1 is not that of proc'):
    hosts.check_shared(tmp_path / 'run')
  assert not list((tmp_path / 'run').iterdir())


def test_a_missing_cluster_is_named(monkeypatch):
  def initialize(*args, **options):
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(ValueError, match='coordinator=auto finds no cluster her'):
    hosts.connect('auto', None, None, 30)
  with pytest.raises(ValueError, match='--coordinator=a:1: coordinator_addr'):
    hosts.connect('a:1', None, None, 30)
