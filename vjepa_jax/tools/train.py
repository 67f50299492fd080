"""Runs one task of a config.

python main.py --config=configs/vjepa1.py:l16 --workdir=runs/mine
python main.py --list_configs

Exit codes: 0 done; 2 a mistake in flags, config or data; 75 the platform took
the machine back, and the run saved and left; anything else is a failure, the
loss of another process among them. The same command resumes.
"""

import importlib
import re
from types import SimpleNamespace

from vjepa_jax.errors import UserError
from vjepa_jax.tools import command, recipes

# Nothing heavy is imported here: decoding workers import main.py again.

_PREEMPTED = 75  # EX_TEMPFAIL

# config.task: the function in the module of that name in tasks/.
_TASKS = {
  'pretrain': 'pretrain',
  'quickstart': 'quickstart',
  'finetune': 'finetune',
  'probe': 'probe',
  'decoder': 'train_decoder',
  'action': 'train_action',
  'discs': 'discs',
}


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  recipes.define_config(define.values)
  define.bool('list_configs', 'Print the recipes there are.', False)
  define.string('workdir', 'Directory of the run; resumes if it was one.')
  define.string('profile_steps', 'FIRST:LAST, trace these steps by XLA.')
  define.string(
    'coordinator',
    "Several hosts: 'auto' on TPU pods, GKE and SLURM, else HOST:PORT of "
    'process 0, with --num_processes and --process_index.',
  )
  define.integer('num_processes', 'Number of hosts.')
  define.integer('process_index', 'Which one.')
  define.integer(
    'heartbeat_seconds', 'Silence after which a host counts as lost.', 30
  )


def main(options: SimpleNamespace) -> int:
  """Runs the task, alone or as one of several processes."""
  if options.list_configs:
    print(recipes.format_recipes())
    return 0
  _check_options(options)
  profile_steps = _parse_range(options.profile_steps)
  import jax  # noqa: PLC0415

  if jax.config.jax_compilation_cache_dir is None:
    # A resumed run starts in seconds; JAX_COMPILATION_CACHE_DIR wins.
    cache = f'{options.workdir}/compilation_cache'
    jax.config.update('jax_compilation_cache_dir', cache)
  if not options.coordinator:
    return _run_task(options, profile_steps)
  from vjepa_jax.parallel import hosts  # noqa: PLC0415

  hosts.connect(
    options.coordinator,
    options.num_processes,
    options.process_index,
    options.heartbeat_seconds,
  )

  def check_and_run():
    facts = {'config': options.config.to_dict()}
    hosts.check(facts, options.workdir)
    return _run_task(options, profile_steps)

  code = command.guard(check_and_run)
  if code:
    # Who leaves because the machine is wanted waits until all have saved.
    hosts.leave(code, seconds=300 if code == _PREEMPTED else 10)
  return code


def _check_options(options: SimpleNamespace) -> None:
  """Raises UserError for what is wrong with the flags."""
  from etils import epath  # noqa: PLC0415

  from vjepa_jax.data import storage  # noqa: PLC0415

  if options.config is None:
    raise UserError('give --config=FILE; --list_configs prints what there is')
  if options.workdir is None:
    raise UserError('give --workdir=DIRECTORY, where the run is kept')
  try:
    folder = epath.Path(options.workdir)
  except KeyError as error:
    raise UserError(
      f'--workdir={options.workdir}: a run is kept in a local folder or at gs://'
    ) from error
  # Remote storage has no folders that would have to be there.
  if not storage.is_remote(folder):
    while not folder.exists() and folder != folder.parent:
      folder = folder.parent
  if storage.exists(folder) and not storage.is_folder(folder):
    raise UserError(
      f'--workdir={options.workdir}: {folder} is a file, not a directory'
    )
  if options.config.task not in _TASKS:
    raise UserError(
      f'config.task {options.config.task!r} does not exist; there are '
      f'{", ".join(_TASKS)}'
    )


def _run_task(
  options: SimpleNamespace, profile_steps: tuple[int, int] | None
) -> int:
  task = options.config.task
  module = importlib.import_module(f'vjepa_jax.tasks.{task}')
  run = getattr(module, _TASKS[task])
  finished = run(options.config, options.workdir, profile_steps)
  return _PREEMPTED if finished is None else 0


def _parse_range(text: str | None) -> tuple[int, int] | None:
  if text is None:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match:
    raise UserError(f'--profile_steps={text} is not FIRST:LAST')
  return int(match[1]), int(match[2])


if __name__ == '__main__':
  command.run(main, define_flags)
