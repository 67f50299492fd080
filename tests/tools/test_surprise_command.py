"""The command that measures surprise, on a run as pretraining leaves it."""

import json
import shutil

from commands import run_command
import jax
import pytest

from vjepa_jax.interop.layout import Weights, WeightsError
from vjepa_jax.models import zoo
from vjepa_jax.sets import physics
from vjepa_jax.tools import convert, surprise
from vjepa_jax.training.objectives.base import init_models
from vjepa_jax.world.surprise_scores import MODELS


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('physics')
  return physics.write_physics_set(path, num_train=3, num_sets=1)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, folder):
  path = tmp_path_factory.mktemp('run')
  encoder = zoo.build_encoder('nano', tubelet=(8, 16, 16), init_std=0.0)
  predictor = zoo.build_predictor(encoder, num_heads=2, width=24, depth=1)
  params = jax.jit(init_models, static_argnums=(1, 2))(
    jax.random.key(5), encoder, predictor
  )
  models = encoder, params['encoder'], predictor, params['predictor']
  convert.write_workdir(path, Weights(*models))
  config = {
    'clip': {'resolution': 32, 'frames': 16, 'frame_step': 1},
    'objective': {'vjepa': {'target_norm': 'position'}},
    'data': {'sources': {'a': {'path': str(folder / 'train.csv')}}},
  }
  (path / 'config.json').write_text(json.dumps(config))
  return path


def test_a_set_from_films_to_table_and_picture(
  workdir, folder, tmp_path, capsys
):
  # One film is damaged: its pair is left out, counted and named.
  data = tmp_path / 'data'
  shutil.copytree(folder, data)
  (data / 'test/00002.mp4').write_bytes(b'not a film')
  run_command(
    surprise, str(workdir), f'--input={data}', '--stride=8', '--seed=5'
  )
  out = capsys.readouterr().out
  assert '1 of 40 films were left out' in out
  results = json.loads((workdir / 'surprise/results.json').read_text())
  assert results['left_out'] == 1
  settings = [results[k] for k in ('window', 'context_frames', 'stride')]
  assert results['target_norm'] == 'position'
  assert settings == [16, 8, 8]
  for model in MODELS:
    for score in ('max', 'mean'):
      rows = results[model][score]
      assert rows['all']['pairs'] == 19
      assert rows['permanence']['pairs'] == 3
      assert rows['permanence in plain sight']['pairs'] == 1
      assert {'direction', 'behind a screen', 'in plain sight'} < set(rows)
      kinds = [
        rows[p]['accuracy'] * rows[p]['pairs'] for p in physics.PROPERTIES
      ]
      assert sum(kinds) == pytest.approx(rows['all']['accuracy'] * 19)
  # This run's weights are those of an untrained model of the same seed.
  assert results['pretrained'] == results['random_init']
  assert results['pixels'] != results['random_init']
  accuracy = results['pixels']['mean']['colour']['accuracy']
  line = next(x for x in out.splitlines()[::-1] if x.startswith('colour   '))
  assert f'{accuracy:.3f}' in line.split()[-3]
  assert (workdir / 'surprise/surprise.png').stat().st_size > 10_000


def test_a_film_of_ones_own(workdir, folder, tmp_path, capsys):
  video = folder / 'test/00001.mp4'
  flags = f'--video={video}', f'--output={tmp_path / "out"}', '--stride=8'
  run_command(surprise, str(workdir), *flags)
  assert '3 windows, surprise' in capsys.readouterr().out
  results = json.loads((tmp_path / 'out/results.json').read_text())
  assert results['frame'] == [11.5, 19.5, 27.5]
  assert len(results['surprise']) == 3 and min(results['surprise']) > 0
  assert (tmp_path / 'out/surprise.png').exists()


def test_errors_are_named(workdir, folder, tmp_path):
  def fails(match, source=workdir, error=ValueError, **options):
    flags = [f'--{k}={v}' for k, v in ({'input': folder} | options).items()]
    with pytest.raises(error, match=match):
      run_command(surprise, str(source), *flags)

  fails('neither a workdir', source=tmp_path, error=WeightsError)
  fails('whole tubelets of 8 frames', window=12)
  fails('nothing to predict', context_frames=16)
  fails('test.csv does not exist', input='/none', error=FileNotFoundError)
  fails('none of 40 films could be used', window=64)
  fails(
    'film of 32 frames is shorter',
    window=64,
    video=str(folder / 'test/00001.mp4'),
  )
  fails('none.mp4: ', video=str(tmp_path / 'none.mp4'))
  fails('as --reference', reference=str(tmp_path / 'none.csv'))
  file = tmp_path / 'model.pt'
  file.write_bytes(b'')
  fails('with --output', source=file)
  with pytest.raises(ValueError, match='give one workdir'):
    run_command(surprise)
