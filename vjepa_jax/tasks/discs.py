"""The whole chain in the discs world: films, features, a model, actions."""

import time

from etils import epath
from ml_collections import ConfigDict

from vjepa_jax.errors import UserError
from vjepa_jax.interop.load import make_hashable, read_config
from vjepa_jax.interop.world import load_action_model
from vjepa_jax.sets import discs as world
from vjepa_jax.tasks.action import train_action
from vjepa_jax.tasks.planning import plan_in_discs
from vjepa_jax.tasks.pretrain import pretrain
from vjepa_jax.tasks.session import report
from vjepa_jax.world import ladder


def discs(
  config: ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict | None:
  """Runs `configs/action.py:discs`; writes `results.json` and pictures.

  V-JEPA on the films of play without their actions; predictors with actions on
  its features, and on those of the same encoder untrained; planning with both.
  What is finished is not done again. With a `config.backbone` that is the
  encoder, and with `config.smoke` the predictor alone is trained, on an
  untrained one.
  """
  if config.smoke:
    return train_action(config, workdir, profile_steps)
  workdir = epath.Path(workdir)
  config = ConfigDict(config.to_dict())
  start, seconds = time.perf_counter(), {}

  def count(name):
    seconds[name] = time.perf_counter() - start - sum(seconds.values())

  chain, pretraining = config.chain, config.pretraining
  folder = world.write_discs_set(chain.folder, num_train=chain.num_train)
  config.data.sources.episodes.path = str(folder / 'train')
  count('data')
  if not config.backbone:
    pretraining.data.sources = dict(
      discs=dict(path=str(folder / 'train.csv'), weight=1.0)
    )
    if pretrain(pretraining, workdir / 'pretraining') is None:
      return None
    config.backbone = str(workdir / 'pretraining')
    count('pretraining')
  untrained = ConfigDict(config.to_dict())
  trained = read_config(config.backbone)
  if 'encoder' not in trained:
    raise UserError(
      f'config.backbone {config.backbone} is no workdir of pretraining: what '
      'it was before training is not known, and is to be compared with'
    )
  untrained.backbone = ''
  untrained.encoder = make_hashable(trained['encoder'])
  untrained.clip.resolution = trained['clip']['resolution']
  runs = {
    'ours': (config, workdir),
    'untrained': (untrained, workdir / 'untrained'),
  }
  models = {}
  for name, (recipe, path) in runs.items():
    if train_action(recipe, path, profile_steps) is None:
      return None
    models[name] = load_action_model(path)
    count(f'predictor_{name}')
  results, text = plan_in_discs(
    models,
    workdir / 'plan',
    {name: ladder.make_search(name) for name in world.TASKS},
    ladder.RUNGS,
    episodes=chain.episodes,
    seeds=chain.seeds,
    num_play=chain.num_train // len(world.TASKS),
  )
  count('planning')
  results['steps'] = {
    'pretraining': pretraining.total_steps,
    'predictor': config.total_steps,
  }
  results['seconds'] = seconds | {'total': sum(seconds.values())}
  report(workdir, results, f'{text}\n{results["seconds"]["total"]:.0f} s')
  return results
