"""Planning as a command: numbers, pictures, mistakes."""

import json

from commands import run_command
import pytest

from configs import action as recipe
from vjepa_jax.tasks.action import train_action
from vjepa_jax.tasks.smoke import shrink
from vjepa_jax.tools import plan_actions, report


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  train_action(shrink(recipe.get_config('discs'), folder), folder)
  return folder


def test_wrong_rungs_are_refused(tmp_path):
  for flags, message in (
    (['--rungs=true_dino'], 'rungs=true_dino: there are random, cloning'),
    (['--rungs=all'], 'need --untrained=WORKDIR'),
  ):
    with pytest.raises(ValueError, match=message):
      run_command(plan_actions, str(tmp_path), *flags)
  with pytest.raises(ValueError, match='no predictor with actions|no config'):
    run_command(plan_actions, str(tmp_path))


@pytest.mark.slow
def test_a_ladder_with_numbers_pictures_and_what_they_depend_on(
  workdir, capsys
):
  run_command(
    plan_actions,
    str(workdir),
    '--task=reach',
    '--episodes=4',
    '--seeds=2',
    '--rungs=random,cloning,model_ours,true_state',
    '--samples=16',
    '--iterations=2',
    '--elites=4',
    '--horizon=1',
    '--play=20',
  )
  results = json.loads((workdir / 'plan/results.json').read_text())
  rungs = results['success']['reach']
  assert list(rungs) == ['random', 'cloning', 'model_ours', 'true_state']
  for share, low, high in rungs.values():
    assert 0 <= low <= share <= high <= 1
  assert rungs['true_state'][0] == 1.0
  setup = results['setup']['reach']
  assert (setup['tasks'], setup['budget'], setup['horizon']) == (8, 10, 1)
  assert len(results['latent_error']['imagined']) == 6
  out = capsys.readouterr().out
  assert 'reach: 8 tasks, 10 steps to come within 0.05 of a goal 0.2' in out
  for name in ('ladder.png', 'landscape.png', 'reach.png', 'reach.gif'):
    assert (workdir / 'plan' / name).stat().st_size > 1000
  # The page of the run has it all.
  page = report.make_report(workdir, encode=False)
  assert 'goal distance' in page and 'landscape' in page
