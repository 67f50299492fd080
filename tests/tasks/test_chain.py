"""The chain in the discs world, shrunk: films, features, model, actions."""

import json

import pytest

from configs import action as recipe
from vjepa_jax.sets import discs as world
from vjepa_jax.tasks.discs import discs
from vjepa_jax.world import ladder


@pytest.mark.slow
def test_the_chain_ends_in_a_ladder_and_goes_on_where_it_stopped(
  tmp_path, monkeypatch
):
  config = recipe.get_config('discs')
  config.chain.update(
    folder=str(tmp_path / 'data'), num_train=24, episodes=2, seeds=1
  )
  config.pretraining.update(total_steps=2)
  config.pretraining.data.batch_size = 8
  config.pretraining.encoder.size = 'nano'
  config.pretraining.checkpoint.every_steps = 2
  config.pretraining.learning_rate.warmup_steps = 1
  config.update(total_steps=2)
  config.learning_rate.warmup_steps = 1
  config.data.batch_size = 8
  config.checkpoint.every_steps = 2
  config.predictor.update(width=24, depth=1, num_heads=2)
  make_search = ladder.make_search
  monkeypatch.setattr(
    ladder,
    'make_search',
    lambda name: make_search(
      name, samples=8, iterations=1, elites=2, horizon=1
    ),
  )
  monkeypatch.setattr(world, 'BUDGET', dict.fromkeys(world.TASKS, 2))
  results = discs(config, tmp_path / 'run')
  assert json.loads((tmp_path / 'run/results.json').read_text()) == results
  for name in world.TASKS:
    assert tuple(results['success'][name]) == ladder.RUNGS
    assert (tmp_path / f'run/plan/{name}.gif').exists()
  again = discs(config, tmp_path / 'run')
  assert again['success'] == results['success']
  assert again['landscape'] == results['landscape']
