"""Who writes which shards: the machines of an array, or Apache Beam.

A shard is the unit of work and is there whole or not at all, so that the same
command, started again, finishes what is missing, and the shards are the same
for any number of machines.
"""

from collections.abc import Callable
from concurrent import futures
import functools
import importlib
import multiprocessing
import os
import pickle
import shlex
from types import SimpleNamespace

from absl import logging

from vjepa_jax.data import shards
from vjepa_jax.errors import UserError

# Paths of all shards; and what writes those of machine `index` of `count`.
Work = tuple[list[str], Callable[[int, int], None]]

# All cores of this machine.
_LOCAL_BEAM = '--direct_running_mode=multi_processing --direct_num_workers=0'


def add_flags(define: SimpleNamespace) -> None:
  """Defines the flags that say who writes what."""
  define.integer('host_index', 'Of this machine, from 0.')
  define.string(
    'num_hosts', 'Machines that share the work; auto: tasks of a SLURM array.'
  )
  define.enum(
    'engine', 'Machines by number, or Apache Beam.', 'hosts', ['hosts', 'beam']
  )
  define.string('beam', 'Its options, --runner=… for example.', _LOCAL_BEAM)


def find_host(options: SimpleNamespace) -> tuple[int, int]:
  """Finds the number of this machine and how many there are.

  Who asks for several gets its own number from --host_index, or from what
  SLURM tells the tasks of an array and Kubernetes the pods of an indexed job.
  An array may as well be a sweep: it says nothing to who does not ask.

  Raises:
    UserError: They are not told, or do not fit.
  """
  index, count, by = options.host_index, options.num_hosts, 'flags'
  environment = os.environ
  if index is None and count is None:
    if 'SLURM_ARRAY_TASK_ID' in environment:
      logging.info('all is for this task; --num_hosts=auto shares it')
    return 0, 1
  if count is None:
    raise UserError('--host_index needs --num_hosts')
  told = ''
  if index is None and 'SLURM_ARRAY_TASK_ID' in environment:
    by = 'SLURM_ARRAY_TASK_ID'
    first, step = (
      int(environment.get(f'SLURM_ARRAY_TASK_{name}', default))
      for name, default in (('MIN', 0), ('STEP', 1))
    )
    index = (int(environment[by]) - first) // step
    told = environment.get('SLURM_ARRAY_TASK_COUNT', '')
  elif index is None and 'JOB_COMPLETION_INDEX' in environment:
    by = 'JOB_COMPLETION_INDEX'
    index = int(environment[by])
  if index is None:
    raise UserError(
      f'--num_hosts={count} needs --host_index: this is no task of a SLURM '
      'array and no pod of an indexed job'
    )
  if count == 'auto' and not told:
    raise UserError(
      f'machine {index}, by {by}, is not told how many there are: give '
      '--num_hosts a number'
    )
  count = told if count == 'auto' else count
  if not count.isdecimal():
    raise UserError(f'--num_hosts={count} is neither a number nor auto')
  count = int(count)
  if not 0 <= index < count:
    raise UserError(
      f'machine {index}, by {by}, is not one of --num_hosts={count}, which '
      'count from 0'
    )
  logging.info('machine %d of %d, by %s', index, count, by)
  return index, count


def spread(command: str, options: SimpleNamespace) -> None:
  """Has the shards written that are not there yet.

  Args:
    command: Module of tools. Its `begin(options)` checks the options and
      returns the `Work`.
    options: Of the command; they can be pickled.

  Raises:
    RuntimeError: Not all could be written by Beam.
    UserError: Beam is not installed, or the machine's number does not fit.
    ValueError: What `begin` or the writing raises.
  """
  if options.engine == 'hosts':
    host = find_host(options)
    _, write = _begin(command, options)
    write(*host)
    return
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError:
    raise UserError(
      "--engine=beam needs Apache Beam: pip install -e '.[beam]'"
    ) from None
  # In a process that ends before others need its accelerator.
  with futures.ProcessPoolExecutor(
    1, multiprocessing.get_context('spawn')
  ) as pool:
    paths = pool.submit(_check, command, options).result()
  missing = shards.find_missing(paths)
  logging.info('%d of %d shards are missing', len(missing), len(paths))
  arguments = PipelineOptions(shlex.split(options.beam))
  with beam.Pipeline(options=arguments) as pipeline:
    numbers = pipeline | beam.Create(missing) | beam.Reshuffle()
    pickled = pickle.dumps(options)
    _ = numbers | beam.Map(_write_shard, command, pickled, len(paths))
  missing = shards.find_missing(paths)
  if missing:
    raise RuntimeError(
      f'{len(missing)} of {len(paths)} shards were not written, the first is '
      f'{paths[missing[0]]}; the log says why, run again to continue'
    )
  # A machine that finds all written says what there is to say of the whole.
  _, write = _begin(command, options)
  write(0, 1)


def _begin(command: str, options: SimpleNamespace) -> Work:
  """Checks the options of a command, and begins its work."""
  return importlib.import_module(f'vjepa_jax.tools.{command}').begin(options)


def _check(command: str, options: SimpleNamespace) -> list[str]:
  """Checks the options of a command; returns the paths of the shards."""
  return _begin(command, options)[0]


@functools.lru_cache(1)
def _begin_once(command: str, pickled: bytes) -> Work:
  """Begins the work, once for all the shards that a worker writes."""
  return _begin(command, pickle.loads(pickled))


def _write_shard(number: int, command: str, pickled: bytes, count: int) -> None:
  """Writes a shard on a worker of Beam, as if each had a machine of its own."""
  try:
    _, write = _begin_once(command, pickled)
    write(number, count)
  # What is wrong with one shard must not end the others.
  except Exception:
    logging.exception('of shard %d', number)
