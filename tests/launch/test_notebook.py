"""The notebook: as it is stored, and from top to bottom at toy size."""

import base64
import io
import json
from pathlib import Path
import re
import subprocess
from types import SimpleNamespace

from PIL import Image
import pytest

NOTEBOOK = Path(__file__).parents[2] / 'launch' / 'colab.ipynb'
_DECODER = (
  '--config.total_steps=2 --config.learning_rate.warmup_steps=1 '
  '--config.data.batch_size=8 --config.statistics_clips=16 '
  '--config.decoder.width=32 --config.decoder.depth=1 '
  '--config.held_out.every_steps=2 --config.held_out.max_clips=8 '
  '--config.held_out.batch_size=8'
)
_PROBE = (
  '--config.total_epochs=1 --config.data.batch_size=16 '
  '--config.evaluation.batch_size=8'
)
_PREDICT = '--max_clips=8 --gallery_clips=16 --batch_size=8'


def _get_sources(kind):
  cells = json.loads(NOTEBOOK.read_text())['cells']
  return [''.join(c['source']) for c in cells if c['cell_type'] == kind]


def test_it_is_stored_without_outputs_and_compiles():
  for cell in json.loads(NOTEBOOK.read_text())['cells']:
    assert not cell.get('outputs') and cell.get('execution_count') is None
  sources = _get_sources('code')
  for source in sources:
    compile(source, 'cell', 'exec')
  # A sentence for each, and one more at the top.
  assert len(_get_sources('markdown')) == len(sources)


def test_it_finds_the_repository_again_after_a_restart(tmp_path, monkeypatch):
  repository = tmp_path / 'origin'
  (repository / 'vjepa_jax').mkdir(parents=True)
  for file in ('setup.py', 'vjepa_jax/__init__.py'):
    (repository / file).touch()
  git = 'git -c user.name=a -c user.email=a@b'
  for command in ('git init -q', 'git add .', f'{git} commit -qm a'):
    subprocess.run(command.split(), cwd=repository, check=True)
  (source,) = [s for s in _get_sources('code') if 'git clone' in s]
  commands = []

  def system(command):
    commands.append(command)
    jax = 'import jax' in command
    shell.user_ns['_exit_code'] = (
      0 if jax else subprocess.call(command, shell=True)
    )

  shell = SimpleNamespace(system=system, user_ns={})
  # Half a clone, as an interrupted one leaves it.
  clone = tmp_path / 'content' / 'vjepa_jax_repository'
  (clone / '.git').mkdir(parents=True)
  for _ in range(2):
    monkeypatch.chdir(clone.parent)
    names = {'REPOSITORY': str(repository), 'INSTALL': False}
    exec(source, names | {'get_ipython': lambda: shell})
    assert Path.cwd() == clone and (clone / 'setup.py').exists()
    assert sum('git clone' in c for c in commands) == 1


def test_its_address_is_that_of_the_package():
  root = NOTEBOOK.parents[1]
  (address,) = re.findall(r"url='([^']*)'", (root / 'setup.py').read_text())
  assert f"REPOSITORY = '{address}'" in _get_sources('code')[0]
  path = address.removeprefix('https://github.com')
  badge = f'colab.research.google.com/github{path}/blob/main/launch/colab.ipynb'
  assert badge in _get_sources('markdown')[0]
  assert badge in (root / 'README.md').read_text()


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
  nbclient = pytest.importorskip('nbclient')
  nbformat = pytest.importorskip('nbformat')
  from vjepa_jax.sets.toy import write_toy_videos

  write_toy_videos(tmp_path / 'videos', 6, size=(128, 160), frames=16)
  options = {
    'encoder.size': 'nano',
    'predictor.width': 48,
    'predictor.depth': 1,
    'motion.folder': tmp_path / 'motion',
    'motion.videos': tmp_path / 'videos',
    'motion.num_train': 96,
    'motion.num_test': 32,
    'motion.max_clips': 96,
    'motion.few_clips': 32,
    'data.batch_size': 16,
    'probe.every_steps': 4,
    'probe.batch_size': 16,
    'learning_rate.warmup_steps': 2,
    'total_steps': 8,
    'log_every_steps': 1,
    'diagnose_every_steps': 2,
  }
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  (first,) = [c for c in notebook.cells if 'OPTIONS =' in c['source']]
  flags = ' '.join(f'--config.{k}={v}' for k, v in options.items())
  first['source'] += (
    f'\nWORKDIR = {str(tmp_path / "run")!r}\nOPTIONS = {flags!r}\n'
    f'PROBE_OPTIONS = {_PROBE!r}\n'
    f'DECODER_OPTIONS = {_DECODER!r}\nPREDICT_OPTIONS = {_PREDICT!r}\n'
    'INSTALL = False\n'
  )
  nbclient.NotebookClient(
    notebook, timeout=900, resources={'metadata': {'path': NOTEBOOK.parent}}
  ).execute()
  outputs = [
    output
    for cell in notebook.cells
    if 'outputs' in cell
    for output in cell['outputs']
  ]
  text = ''.join(output.get('text', '') for output in outputs)
  assert 'accuracy on held-out clips' in text and '.xplane.pb' in text
  data = [output['data'] for output in outputs if 'data' in output]
  pictures = [d['image/png'] for d in data if 'image/png' in d]
  assert pictures
  for picture in pictures:
    content = io.BytesIO(base64.b64decode(picture))
    with Image.open(content) as image:
      assert image.width > 100
  (report,) = [
    d['text/html'] for d in data if 'srcdoc' in d.get('text/html', '')
  ]
  # With what the tools left in the run.
  for words in ('Is this run healthy?', 'Probe', 'Decoder', 'Predict'):
    assert words in report
