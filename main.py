"""Runs one task of a config: python main.py --config=... --workdir=...

Exit codes: 0 done; 2 a mistake in flags, config or data; 69 another process of
the run was lost; 75 the platform took the machine back, and the run saved and
left; else an error. The same command resumes.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from vjepa_jax import mistakes

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
  "Several hosts: 'auto' on TPU pods, GKE and SLURM, else HOST:PORT of process "
  '0, with --num_processes and --process_index.',
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of hosts.')
_PROCESS_INDEX = flags.DEFINE_integer('process_index', None, 'Which one.')

_PREEMPTED = 75  # EX_TEMPFAIL


def _parse_range(text: str | None) -> tuple[int, int] | None:
  if text is None:
    return None
  first, colon, last = text.partition(':')
  if not (colon and first.isdigit() and last.isdigit()):
    raise ValueError(f'--profile_steps={text} is not FIRST:LAST')
  return int(first), int(last)


def _start_jax(config):
  """Sets jax up; returns the watch over the other processes, None if alone."""
  import jax  # noqa: PLC0415

  if jax.config.jax_compilation_cache_dir is None:
    # A resumed run starts in seconds; JAX_COMPILATION_CACHE_DIR wins.
    cache = f'{_WORKDIR.value}/compilation_cache'
    jax.config.update('jax_compilation_cache_dir', cache)
  if not _COORDINATOR.value:
    return None
  from vjepa_jax.parallel import hosts  # noqa: PLC0415

  return hosts.start(
    None if _COORDINATOR.value == 'auto' else _COORDINATOR.value,
    _NUM_PROCESSES.value,
    _PROCESS_INDEX.value,
    facts={'config': config.to_dict()},
    workdir=_WORKDIR.value,
  )


def _run_task(config):
  """Runs the config's task; returns None if it was preempted."""
  profile_steps = _parse_range(_PROFILE.value)
  if config.task == 'pretrain':
    from vjepa_jax.tasks.pretrain import pretrain as task  # noqa: PLC0415
  elif config.task == 'quickstart':
    from vjepa_jax.tasks.quickstart import quickstart as task  # noqa: PLC0415
  elif config.task == 'finetune':
    from vjepa_jax.tasks.finetune import finetune as task  # noqa: PLC0415
  elif config.task == 'probe':
    from vjepa_jax.tasks.probe import probe as task  # noqa: PLC0415
  elif config.task == 'decoder':
    from vjepa_jax.tasks.decoder import train_decoder as task  # noqa: PLC0415
  else:
    raise ValueError(f'config.task {config.task!r} does not exist')
  return task(config, _WORKDIR.value, profile_steps)


def main(argv):
  """Runs the task, alone or as one of several processes."""
  # Of other packages warnings will do: Orbax tells of each file it renames.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= logging.logging.WARNING
      or 'vjepa_jax' in record.pathname
    )
  )
  watch = None
  try:
    if len(argv) > 1:
      raise ValueError(f'unknown argument {argv[1]!r}')
    watch = _start_jax(_CONFIG.value)
    finished = _run_task(_CONFIG.value)
  except (Exception, KeyboardInterrupt) as error:
    if watch is not None:
      watch.fail(error)
    if not mistakes.is_mistake(error):
      raise
    return mistakes.explain(error)
  if watch is not None:
    watch.close()
  return _PREEMPTED if finished is None else 0


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=mistakes.parse_flags)
