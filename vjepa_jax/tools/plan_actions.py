r"""Plans actions with a world model, and says how often the goal is reached.

python -m vjepa_jax.tools.plan_actions runs/discs --task=door --episodes=100
python -m vjepa_jax.tools.plan_actions runs/discs --rungs=all \
  --untrained=runs/discs/untrained --seeds=3

WORKDIR is a run of configs/action.py on the discs set. Writes to WORKDIR/plan:
`results.json`, `ladder.png`, `landscape.png` (the energy of all actions of a
step) and, of each task, films of episodes: what was seen, the goal, and the end
of each plan as the model imagines it. docs/planning.md says what they mean.
"""

import json
from types import SimpleNamespace

from etils import epath

from vjepa_jax.data import storage
from vjepa_jax.errors import UserError
from vjepa_jax.sets.discs import TASKS
from vjepa_jax.tools import command

_RUNGS = ['random', 'model_ours', 'true_state']


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.enum('set', 'World to act in.', 'discs', ['discs'])
  define.enum('task', 'What to do; all if none.', None, TASKS)
  define.integer('episodes', 'Tasks of a kind and seed.', 100, least=1)
  define.integer('seeds', 'Draws of tasks and plans.', 1, least=1)
  define.list('rungs', "Of the ladder; 'all' for all of it.", _RUNGS)
  define.string('untrained', 'Workdir of the same on an untrained encoder.')
  define.integer(
    'play', 'Episodes of play a task that cloning and decoder learn from.', 700
  )
  define.string('output', 'Folder; WORKDIR/plan if none.')
  define.enum('method', 'How plans are searched for.', 'cem', ['cem', 'mppi'])
  define.integer('horizon', 'Steps of a plan; by the task if none.')
  define.integer('samples', 'Plans an iteration.', 64)
  define.integer('iterations', 'Of the search.', 3)
  define.integer('elites', 'Plans that the next ones are drawn around.', 8)
  define.enum(
    'energy', 'Of the last frame of a plan, or of all.', 'sum', ['last', 'sum']
  )
  define.enum('loss_exp', 'Power in the energy.', '1', ['1', '2'])
  define.integer('window', 'Frames a prediction is made of; all if 0.', 2)
  define.bool('allow_rollouts', 'Of the released weights, faulty.', False)


def main(options: SimpleNamespace, workdir: str) -> None:
  """Plans, and writes what came of it."""
  # Imported late: --help and wrong flags answer at once.
  from vjepa_jax.interop.world import load_action_model
  from vjepa_jax.tasks.planning import plan_in_discs
  from vjepa_jax.world import ladder

  rungs = ladder.RUNGS if options.rungs == ['all'] else options.rungs
  wrong = set(rungs) - set(ladder.RUNGS)
  if wrong:
    raise UserError(
      f'--rungs={",".join(sorted(wrong))}: there are {", ".join(ladder.RUNGS)}'
    )
  if any('untrained' in rung for rung in rungs) and not options.untrained:
    raise UserError('rungs of an untrained encoder need --untrained=WORKDIR')
  names = [options.task] if options.task else TASKS
  fields = {
    name: getattr(options, name)
    for name in ('method', 'samples', 'iterations', 'elites', 'energy')
  }
  fields['window'] = options.window or None
  fields['loss_exp'] = float(options.loss_exp)
  if options.horizon:
    fields['horizon'] = options.horizon
  searches = {name: ladder.make_search(name, **fields) for name in names}
  models = {'ours': load_action_model(workdir)}
  if options.untrained:
    models['untrained'] = load_action_model(options.untrained)
  for name, model in models.items():
    if model.predictor.action_dim != 2:
      raise UserError(
        f'the model takes actions of {model.predictor.action_dim} numbers, '
        f'those of {options.set} have 2: docs/planning.md shows how a robot is '
        'planned for'
      )
    if options.allow_rollouts:
      models[name] = model._replace(one_step=False)
  folder = epath.Path(workdir)
  output = folder / 'plan' if folder.is_dir() else 'plan'
  output = epath.Path(options.output or output)
  output.mkdir(parents=True, exist_ok=True)
  results, text = plan_in_discs(
    models,
    output,
    searches,
    rungs,
    episodes=options.episodes,
    seeds=options.seeds,
    num_play=options.play,
  )
  path = output / 'results.json'
  storage.replace(path, json.dumps(results, indent=2) + '\n')
  print(f'{text}\nresults: {path}')


if __name__ == '__main__':
  command.run(main, define_flags)
