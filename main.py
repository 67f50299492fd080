"""Runs one task of a config: python main.py --config=... --workdir=..."""

from absl import app, flags, logging
from ml_collections import config_flags

# Nothing heavy is imported here: decoding workers import this file again.

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Recipe: a file in configs/, options after a colon.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run; an interrupted run resumes there.'
)
_PROFILE = flags.DEFINE_string(
  'profile_steps', None, 'FIRST:LAST, trace these steps with XLA profiler.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  "Several hosts: 'auto' on TPU pods and SLURM, else HOST:PORT of process 0, "
  'with --num_processes and --process_index.',
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of hosts.')
_PROCESS_INDEX = flags.DEFINE_integer('process_index', None, 'Which one.')


# Exit code of a run that saved and left: start it again (EX_TEMPFAIL).
_PREEMPTED = 75


def _parse_range(text: str | None) -> tuple[int, int] | None:
  if text is None:
    return None
  first, colon, last = text.partition(':')
  if not (colon and first.isdigit() and last.isdigit()):
    raise app.UsageError(f'--profile_steps={text} is not FIRST:LAST')
  return int(first), int(last)


def main(argv):
  """Reads the flags and runs the task."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  logging.set_verbosity(logging.INFO)
  # Of other packages warnings will do: Orbax tells of each file it renames.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= logging.logging.WARNING
      or 'vjepa_jax' in record.pathname
    )
  )
  profile_steps = _parse_range(_PROFILE.value)

  import jax  # noqa: PLC0415

  if jax.config.jax_compilation_cache_dir is None:
    # A resumed run starts in seconds; JAX_COMPILATION_CACHE_DIR wins.
    cache = f'{_WORKDIR.value}/compilation_cache'
    jax.config.update('jax_compilation_cache_dir', cache)
  if _COORDINATOR.value == 'auto':
    jax.distributed.initialize()
  elif _COORDINATOR.value:
    jax.distributed.initialize(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_INDEX.value
    )
  config = _CONFIG.value
  if config.task == 'pretrain':
    from vjepa_jax.tasks.pretrain import pretrain  # noqa: PLC0415

    finished = pretrain(config, _WORKDIR.value, profile_steps)
  elif config.task == 'quickstart':
    from vjepa_jax.tasks.quickstart import quickstart  # noqa: PLC0415

    finished = quickstart(config, _WORKDIR.value, profile_steps)
  else:
    raise app.UsageError(f'config.task {config.task!r} does not exist')
  return 0 if finished is not None else _PREEMPTED


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
