"""Numbers of every recipe, recorded before its code was last rebuilt.

They are equal to the last bit on a machine like that of the record, and close
on others. After a change of what is computed they are recorded anew by
tests/tasks/golden.py, and the change says why.
"""

import json
import os
from pathlib import Path
import subprocess
import sys

import golden
import numpy as np
import pytest

RECORD = json.loads(Path(__file__).with_name('golden.json').read_text())
FAST = {
  '1': (
    'vjepa1:l16',
    'vjepa2:variant=l16,stage=pretrain',
    'small:random+regularizers',
    'probe:folder,probe=linear',
    'decoder:small',
    'action:droid_release',
  ),
  '8': ('vjepa1:l16', 'finetune:folder'),
}


def _check(devices, names, path, compilation_cache):
  subprocess.run(
    [sys.executable, golden.__file__, str(path), *names],
    cwd=Path(__file__).parents[2],
    env=os.environ
    | {
      'PYTHONPATH': '.',
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': devices,
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_COMPILATION_CACHE_DIR': str(compilation_cache),
    },
    check=True,
    timeout=3000,
  )
  found = json.loads(path.read_text())
  expected = {name: RECORD['devices'][devices][name] for name in names}
  if found['machine'] == RECORD['machine']:
    assert found['recipes'] == expected
  for name in names:
    for key in ('losses', 'absolute', 'squares'):
      np.testing.assert_allclose(
        found['recipes'][name][key],
        expected[name][key],
        rtol=1e-2 if 'bfloat16' in name else 1e-4,
        err_msg=f'{name} {key}',
      )


@pytest.mark.parametrize('devices', FAST)
def test_recipes_give_the_recorded_numbers(
  devices, tmp_path, compilation_cache
):
  _check(devices, FAST[devices], tmp_path / 'found.json', compilation_cache)


@pytest.mark.slow
@pytest.mark.parametrize('devices', RECORD['devices'])
def test_all_recipes_give_the_recorded_numbers(
  devices, tmp_path, compilation_cache
):
  names = list(RECORD['devices'][devices])
  _check(devices, names, tmp_path / 'found.json', compilation_cache)


def test_the_record_is_of_all_recipes():
  assert set(RECORD['devices']['1']) == set(golden.RECIPES)
  assert set(golden.RECIPES) - set(RECORD['devices']['8']) == {
    'vjepa1:l16+microbatches'
  }
