"""Makes docs/planning.md of the results of a run of configs/action.py:discs.

python docs/make_planning.py runs/discs  # keeps its results.json and pictures
python docs/make_planning.py             # from docs/planning/results.json
"""

import json
from pathlib import Path
import shutil
import sys

_HERE = Path(__file__).parent
_KEPT = _HERE / 'planning'
_SHOWN = 'reach'  # the task whose episodes are shown
_PICTURES = 'ladder.png', 'landscape.png', f'{_SHOWN}.png'
_RUNGS = {
  'random': 'random actions',
  'cloning': 'behaviour cloning of the play',
  'true_pixels': 'true dynamics, pixels',
  'true_blurred': 'true dynamics, blurred pixels',
  'true_untrained': 'true dynamics, untrained encoder',
  'true_ours': 'true dynamics, our encoder',
  'model_untrained': 'learned model, untrained encoder',
  'model_ours': 'learned model, our encoder',
  'true_state': 'true dynamics, true distance',
}
_PAGE = """# Planning

What a world model is for in the end: V-JEPA 2-AC
([arXiv 2506.09985](https://arxiv.org/abs/2506.09985)) predicts what an action
will make of a frame, and plans by searching for the actions whose imagined end
is nearest to the picture of a goal. Here is the whole chain in a small world,
by one command:

```bash
python main.py --config=configs/action.py:discs --workdir=runs/discs
```

1. Episodes of random play: an agent, a red disc, is moved by up to .15 a step
   along each axis of a unit square, pushes a blue disc and stops at walls
   (`vjepa_jax/sets/discs.py`; `python -m vjepa_jax.tools.discs_set` writes them
   alone).
2. V-JEPA on their films, without actions: the recipe of the quickstart.
3. A predictor with actions on the frozen features, teacher forcing and a
   rollout of two steps; and the same on the encoder before training.
4. Planning: tasks of three kinds, each given by the picture of its goal.

- reach: be .25 to .6 away, nothing in between;
- push: bring the other disc .15 to .3 away, straight ahead;
- door: be in the other room; the door is beside the way, and who goes straight
  for the goal ends at the wall.

Actions are those that were asked for, and the model is shown no state of the
robot: an action that a wall stopped never came to be, so that nobody can learn
from measured differences that walls stop (`config.state_kind = 'hidden'`; robot
data is `'pose'`, as published).

## The ladder

The same tasks and the same search on all rungs. With true dynamics every plan
is really tried out and rendered: what fails there is the energy's or the
search's fault. What a learned model loses against true dynamics in the same
features is the model's.

{table}

Share of tasks in which the goal is reached, with 95 % intervals (Wilson's) over
tasks: encoder and predictors are of one training run. Cloning learns from pairs
of frames up to three steps apart.

{setup}

![ladder](planning/ladder.png)

{reading}

What was aimed at, .80 on reach and push with the learned model on our encoder
and more than pixels, is missed: the energy rises within a step of the goal and
is flat beyond (docs/log.md), which blurred pixels and untrained features do
better. On push the model loses most. On door, where going straight for the goal
and doing what play did end at the wall, plans in features reach more than
pixels and cloning do, those of our encoder by no more than chance over the
untrained.

{imagined}## Planning with your own model or robot

```bash
python -m vjepa_jax.tools.plan_actions runs/discs --task=door --episodes=100
python -m vjepa_jax.tools.plan_actions runs/discs --horizon=1 --energy=last \\
    --method=mppi
```

prints success beside the budget, the tolerance, the distance of goals and the
size of the search, without which it says little, and writes `results.json`,
pictures and films to `runs/discs/plan`. A robot is an object with three methods
for `vjepa_jax.world.acting.run_episode`:

```python
class Arm:
  def reset(self, task):  # begins; returns the Observation of the goal
    ...

  def observe(self):  # frames uint8 [1, h, w, 3], states float32 [1, 7]
    return Observation(frames, states)

  def act(self, actions):  # [1, 4]: carries them out, and waits for the end
    ...


model = load_action_model('vjepa2-ac-vitg.pt')
search = Search(horizon=1)  # 800 samples, 10 iterations, as published
plan = make_model_search(model, search, axes=(0, 1, 2, 6))
policy = Planner(plan, see_frames, shape=(1, 4), seed=0)
run_episode(Arm(), task, policy, steps=10)
```

The search of the paper is the default of `world.planning.Search`: 800 samples,
10 iterations, 10 elites, a box of 7.5 cm along each axis, one step ahead. With
the released weights more than one step is refused without `--allow_rollouts`:
their rollouts were trained with a faulty loss. `world.action_scores.calibrate`
finds the rotation by which a camera that stands elsewhere turns all plans.
"""

_IMAGINED = """## What the model imagines

Mean absolute difference between features imagined of true actions and those of
what came, beside a world that stands still, on play that nobody trained on:

{errors}

The energy of all actions of one step, the frame that followed being the goal:
{landscape}

![energies: truth red, least white](planning/landscape.png)

Episodes: what is seen; the end of each plan, as a linear decoder of the
features shows it; and, last, the goal.

![episodes](planning/{shown}.png)

"""


def make_page(results: dict) -> str:
  """Makes the page."""
  success, setups = results['success'], results['setup']
  rows = [['', *success], ['---'] * (1 + len(success))]
  for rung, title in _RUNGS.items():
    cells = (success[name].get(rung) for name in success)
    texts = (
      f'{cell[0]:.2f} [{cell[1]:.2f}, {cell[2]:.2f}]' if cell else ''
      for cell in cells
    )
    rows.append([title, *texts])
  setup = '\n'.join(
    f'- {name.capitalize()}: {s["tasks"]} tasks, {s["budget"]} steps to come '
    f'within {s["tolerance"]} of a goal {s["goal_distance"][0]} to '
    f'{s["goal_distance"][1]} away, plans of {s["horizon"]} steps, '
    f'{s["samples"]} samples, {s["iterations"]} iterations, energy '
    f'{s["energy"]}.'
    for name, s in setups.items()
  )
  return _PAGE.format(
    table=_format(rows),
    setup=setup,
    reading=read(results),
    imagined=show_imagined(results),
  )


def show_imagined(results: dict) -> str:
  """Says how far off the model is; nothing where it was not measured."""
  if 'landscape' not in results:
    return ''
  errors, energy = results['latent_error'], results['landscape']
  steps = range(1, 1 + len(errors['imagined']))
  table = [['steps', *map(str, steps)], ['---'] * (1 + len(steps))]
  for name, values in errors.items():
    table.append([name, *(f'{x:.3f}' for x in values)])
  return _IMAGINED.format(
    errors=_format(table),
    landscape=f'{energy["zero"]:.3f} of no action, {energy["truth"]:.3f} of '
    f'the true one, {energy["least"]:.3f} at the least; {energy["rank"]:.1%} '
    'of a grid have less than the truth, and the best of the grid is '
    f'{energy["action_error"]:.3f} away from it.',
    shown=_SHOWN,
  )


def read(results: dict) -> str:
  """Says what the ladder says: who loses how much, and what is not known."""
  lines = []
  for name, rungs in results['success'].items():
    s = {rung: share[0] for rung, share in rungs.items()}
    parts = []
    if {'true_ours', 'model_ours'} <= s.keys():
      lost = {
        'the search': 1 - s['true_state'],
        'the energy of our encoder': s['true_state'] - s['true_ours'],
        'the model': s['true_ours'] - s['model_ours'],
      }
      texts = ', '.join(f'{who} {max(0.0, x):.2f}' for who, x in lost.items())
      parts.append(
        f'{s["model_ours"]:.2f} by the learned model on our encoder. Of what '
        f'is lost: {texts}; most by {max(lost, key=lost.get)}'
      )
    missing = [title for rung, title in _RUNGS.items() if rung not in s]
    if missing:
      parts.append(f'not climbed in this run: {"; ".join(missing)}')
    lines.append(f'- {name}: {". ".join(parts)}.')
  steps = results['steps']
  return '\n'.join(
    [
      *lines,
      '',
      f'One run, with {steps["pretraining"]} steps of pretraining and '
      f'{steps["predictor"]} of the predictors. The recipe plans for 100 tasks '
      'of each kind; `--config.chain.episodes` is their number.',
    ]
  )


def _format(rows) -> str:
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def main() -> None:
  """Keeps what a run found, if one is given, and writes the page."""
  for folder in map(Path, sys.argv[1:]):
    _KEPT.mkdir(exist_ok=True)
    shutil.copy(folder / 'results.json', _KEPT)
    for name in _PICTURES:
      if (folder / 'plan' / name).exists():
        shutil.copy(folder / 'plan' / name, _KEPT)
  results = json.loads((_KEPT / 'results.json').read_text())
  (_HERE / 'planning.md').write_text(make_page(results))


if __name__ == '__main__':
  main()
