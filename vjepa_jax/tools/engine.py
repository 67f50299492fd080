"""Who writes which shards: the machines of an array, or Apache Beam.

A shard is the unit of work and is there whole or not at all, so that the same
command, started again, finishes what is missing, and the shards are the same
for any number of machines.
"""

import importlib
import os
import shlex
from types import SimpleNamespace

from absl import logging

from vjepa_jax.data import shards, storage
from vjepa_jax.errors import UserError

# All cores of this machine.
_LOCAL_BEAM = '--direct_running_mode=multi_processing --direct_num_workers=0'


def add_flags(define: SimpleNamespace) -> None:
  """Defines the flags that say who writes what."""
  define.integer(
    'host_index', 'Of this machine, from 0. Tasks of SLURM arrays know it.'
  )
  define.integer('num_hosts', 'Machines that share the work.')
  define.enum(
    'engine', 'Machines by number, or Apache Beam.', 'hosts', ['hosts', 'beam']
  )
  define.string('beam', 'Its options, --runner=… for example.', _LOCAL_BEAM)


def find_host(options: SimpleNamespace) -> tuple[int, int]:
  """Finds the number of this machine and how many there are.

  Flags come first, then what SLURM tells the tasks of an array and Kubernetes
  the pods of an indexed job, which have to be told their number.

  Raises:
    UserError: They are not told, or do not fit.
  """
  index, count, by = options.host_index, options.num_hosts, 'flags'
  environment = os.environ
  if index is None and 'SLURM_ARRAY_TASK_ID' in environment:
    by = 'SLURM_ARRAY_TASK_ID'
    first, step, known = (
      int(environment.get(f'SLURM_ARRAY_TASK_{name}', default))
      for name, default in (('MIN', 0), ('STEP', 1), ('COUNT', 0))
    )
    index = (int(environment[by]) - first) // step
    count = count or known or None
  elif index is None and 'JOB_COMPLETION_INDEX' in environment:
    by = 'JOB_COMPLETION_INDEX'
    index = int(environment[by])
  if index is None and count is None:
    return 0, 1
  if index is None or count is None:
    known = f' ({by} is {index})' if by != 'flags' else ''
    raise UserError(
      f'give both of --host_index and --num_hosts, or none{known}'
    )
  if not 0 <= index < count:
    raise UserError(
      f'--host_index={index} is not one of --num_hosts={count}, which count '
      'from 0'
    )
  logging.info('machine %d of %d, by %s', index, count, by)
  return index, count


def spread(command: str, options: SimpleNamespace) -> None:
  """Has the shards written that are not there yet.

  Args:
    command: Module of tools. Its `write(options, index, count)` writes what is
      for machine `index` of `count`, and `name_shards(options)` names all.
    options: Of the command; they can be pickled.

  Raises:
    RuntimeError: Not all could be written by Beam.
    UserError: Beam is not installed, or the machine's number does not fit.
  """
  module = importlib.import_module(f'vjepa_jax.tools.{command}')
  if options.engine == 'hosts':
    module.write(options, *find_host(options))
    return
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError:
    raise UserError(
      "--engine=beam needs Apache Beam: pip install -e '.[beam]'"
    ) from None
  paths = module.name_shards(options)
  storage.make_folder(options.output)
  missing = shards.find_missing(paths)
  logging.info('%d of %d shards are missing', len(missing), len(paths))
  arguments = PipelineOptions(shlex.split(options.beam))
  with beam.Pipeline(options=arguments) as pipeline:
    numbers = pipeline | beam.Create(missing) | beam.Reshuffle()
    _ = numbers | beam.Map(_write_shard, command, options, len(paths))
  missing = shards.find_missing(paths)
  if missing:
    raise RuntimeError(
      f'{len(missing)} of {len(paths)} shards were not written, the first is '
      f'{paths[missing[0]]}; the log says why, run again to continue'
    )


def _write_shard(
  number: int, command: str, options: SimpleNamespace, count: int
) -> None:
  """Writes a shard on a worker of Beam, as if each had a machine of its own."""
  try:
    module = importlib.import_module(f'vjepa_jax.tools.{command}')
    module.write(options, number, count)
  # What is wrong with one shard must not end the others.
  except Exception:
    logging.exception('shard %d was not written', number)
