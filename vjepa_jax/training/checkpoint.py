"""Checkpoints: written in the background, whole or not at all."""

from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from vjepa_jax.data import storage
from vjepa_jax.parallel import hosts, replicas
from vjepa_jax.training.damage import (
  CheckpointError,
  DamagedError,
  explain_damage,
  hide_orphans,
)
from vjepa_jax.training.state import TrainState

_TREES = ('params', 'target', 'opt_state')
# Copies of an array on several devices are written in parts, one a device. To
# cut a smaller part takes a program, which takes longer to compile.
_MIN_PART_BYTES = 2**20


def get_directory(workdir: epath.PathLike) -> epath.Path:
  """Returns where the checkpoints of a workdir are, absolute."""
  directory = epath.Path(workdir) / 'checkpoints'
  # An address is absolute, which epath does not know.
  return directory if storage.is_remote(workdir) else directory.absolute()


def _place(tree: Any, shardings: Any) -> Any:
  """Adds to the shapes of a tree where its leaves shall go."""
  return jax.tree.map(lambda x, s: x.update(sharding=s), tree, shardings)


def _describe(tree: Any) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_model(
  checkpointer: ocp.training.Checkpointer, step: int, item: str, wanted: Any
) -> None:
  """Compares shapes, because Orbax's own error names a missing handler."""
  with explain_damage(checkpointer.directory, step):
    found = checkpointer.checkpointables_metadata(step).metadata[item]
  have, want = _describe(found), _describe(wanted)
  for name in sorted(have | want):
    if have.get(name) != want.get(name):
      raise CheckpointError(
        f'{checkpointer.directory}/{step} is of another model'
        f'{" or optimizer" * (item == "opt_state")}: {item}/{name} '
        f'has shape {have.get(name, "(absent)")}, this config needs '
        f'{want.get(name, "(absent)")}; use the config it was made with or '
        'another --workdir'
      )


def _load(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  abstract: TrainState,
  shardings: TrainState,
) -> tuple[TrainState, dict[str, Any]]:
  """Loads the state of a step, and its progress.

  All hosts call this; those of one replica read, and send it to the others.

  Raises:
    CheckpointError: On all hosts alike.
  """
  wanted = _get_trees(_place(abstract, shardings))
  copies = replicas.split_replicas(shardings.step.mesh)
  own = replicas.place_on_first(wanted, copies) if copies else wanted
  items, reason = None, ''
  with hide_orphans():
    try:
      for item in ('params', 'opt_state'):
        _check_model(checkpointer, step, item, wanted[item])
      items = _read(
        checkpointer, step, {**(own or {}), 'position': {'samples': 0}}
      )
      with explain_damage(checkpointer.directory, step):
        metadata = checkpointer.checkpointables_metadata(step)
    except DamagedError as error:
      reason = str(error)
  # Who could read waits for nobody who could not.
  for failure in filter(None, hosts.gather(reason)):
    raise DamagedError(failure)
  samples = int(items.pop('position')['samples'])
  if copies:
    items = replicas.broadcast(items or None, wanted, copies)
  state = TrainState(
    step=jax.device_put(np.int32(step), shardings.step),
    **{name: items.get(name) for name in _TREES},
  )
  facts = metadata.custom_metadata or {}
  progress = dict(facts.get('progress') or {})
  for name in ('model', 'data'):
    progress[name] = facts.get(name) or {}
  return state, progress | {'samples': samples}


def _read(
  checkpointer: ocp.training.Checkpointer, step: int, wanted: dict[str, Any]
) -> dict[str, Any]:
  """Reads items of a checkpoint, each host by itself.

  Together they would wait for one that fails.
  """
  process = jax.process_index()
  context = ocp.Context()
  context.multiprocessing.primary_host = process
  context.multiprocessing.active_processes = {process}
  context.multiprocessing.barrier_sync_key_prefix = f'host_{process}'
  directory = checkpointer.directory
  with explain_damage(directory, step), context:
    return ocp.load_checkpointables(directory / str(step), wanted)


def restore(
  workdir: epath.PathLike, abstract: TrainState, shardings: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
  """Restores the newest checkpoint that can be read onto any mesh.

  Those that are damaged are set aside, as `damaged_STEP`. All hosts call this.

  Args:
    workdir: Directory of the run.
    abstract, shardings: Shapes of the state, and where its leaves go.

  Returns:
    The state and its progress, see `Checkpoints.save`, with the 'model' and the
    'data' of the checkpoint; None if there never was one.

  Raises:
    CheckpointError: The checkpoint is of another model, or all are damaged.
  """
  directory = get_directory(workdir)
  if not directory.exists():
    return None
  with ocp.training.Checkpointer(directory) as checkpointer:
    while checkpointer.latest is not None:
      step = checkpointer.latest.step
      try:
        restored = _load(checkpointer, step, abstract, shardings)
      except DamagedError as error:
        name = _set_aside(directory, step)
        logging.warning('%s: set aside as %s', error, name)
        checkpointer.reload()
      else:
        logging.info('resumed from step %d', step)
        return restored
  damaged = sorted(path.name for path in directory.glob('damaged_*'))
  if damaged:
    raise CheckpointError(
      f'no checkpoint in {directory} can be read, only {", ".join(damaged)} '
      'are left: start anew in another --workdir'
    )
  return None


def _set_aside(directory: epath.Path, step: int) -> str:
  """Renames a checkpoint, by one host; returns its new name to all."""
  name = f'damaged_{step}'
  while (directory / name).exists():
    name += '_again'
  hosts.gather('looked')
  if jax.process_index() == 0:
    (directory / str(step)).rename(directory / name)
  hosts.gather('renamed')
  return name


def _get_trees(state: TrainState) -> dict[str, Any]:
  """Returns the items that a state has; fine-tuning has no target."""
  found = ((name, getattr(state, name)) for name in _TREES)
  return {name: tree for name, tree in found if tree is not None}


def read_model(path: epath.PathLike) -> tuple[int, dict[str, Any]]:
  """Reads which model the newest checkpoint of a workdir is of.

  Returns the step of it, and what `Checkpoints` was given as `model`.

  Raises:
    CheckpointError: There is no checkpoint.
  """
  checkpointer, step = _open_latest(path)
  with checkpointer, explain_damage(checkpointer.directory, step):
    metadata = checkpointer.checkpointables_metadata(step)
  return step, (metadata.custom_metadata or {}).get('model') or {}


def _open_latest(path: epath.PathLike) -> tuple[ocp.training.Checkpointer, int]:
  """Opens the checkpoints of another run to read its newest one."""
  directory = get_directory(path)
  if not directory.exists():
    raise CheckpointError(f'{path} holds no checkpoints: is it a --workdir?')
  checkpointer = ocp.training.Checkpointer(directory)
  if checkpointer.latest is None:
    raise CheckpointError(f'{directory} holds no complete checkpoint')
  return checkpointer, checkpointer.latest.step


class Checkpoints:
  """The checkpoints of one workdir.

  Params, target, optimizer state and data position are separate items, so that
  an evaluation loads the target alone.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    every_steps: int,
    keep: int,
    keep_every_steps: int | None = None,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
  ):
    """Opens or makes `workdir/checkpoints`.

    Args:
      workdir: Directory of the run.
      every_steps: Save when the step is a multiple of it.
      keep: Number of latest checkpoints kept.
      keep_every_steps: Keep those at multiples of it for ever.
      model: Description of the model, JSON, saved with each checkpoint.
      data: Of what it is trained on, JSON, saved and compared.
    """
    policies = ocp.training.preservation_policies
    preserve = policies.LatestN(keep)
    if keep_every_steps:
      preserve = policies.AnyPreservationPolicy(
        [preserve, policies.EveryNSteps(keep_every_steps)]
      )
    self._every_steps = every_steps
    self._context = ocp.Context()
    saving = self._context.array.saving
    saving.min_slice_bytes_for_replica_parallel = _MIN_PART_BYTES
    self._metadata = {'model': dict(model or {}), 'data': dict(data or {})}
    self._checkpointer = ocp.training.Checkpointer(
      get_directory(workdir),
      # The loop decides when; Orbax's default would save at every chance.
      save_decision_policy=(
        ocp.training.save_decision_policies.FixedIntervalPolicy(1)
      ),
      preservation_policy=preserve,
      cleanup_tmp_directories=True,
    )

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, None if none."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def is_due(self, step: int) -> bool:
    """Says whether a state at this step is to be saved."""
    return step % self._every_steps == 0 and step != self.latest_step()

  def save(
    self, step: int, state: TrainState, progress: Mapping[str, Any]
  ) -> None:
    """Starts to save, unless this step is saved; `wait` ends it.

    Args:
      step: Steps done, known to the host without waiting for the device.
      state: The state; its buffers may be donated as soon as this returns.
      progress: JSON; among it 'samples', see `Feed.progress`.

    Raises:
      Exception: What went wrong in an earlier save.
    """
    if step == self.latest_step():
      return
    with self._context:
      self._checkpointer.save_checkpointables_async(
        step,
        {**_get_trees(state), 'position': {'samples': progress['samples']}},
        custom_metadata=self._metadata | {'progress': dict(progress)},
      )

  def wait(self) -> None:
    """Waits until what was started is saved; raises what went wrong."""
    self._checkpointer.wait()

  def close(self) -> None:
    """Finishes and closes."""
    self._checkpointer.close()


def load_item(
  path: epath.PathLike,
  abstract: Any,
  shardings: Any = None,
  *,
  item: str = 'target',
  step: int | None = None,
) -> Any:
  """Loads one item of a workdir's checkpoint, by default the EMA encoder.

  Args:
    path: The workdir.
    abstract: Shapes of its parameters.
    shardings: Where they shall go; None for the default device.
    item: 'target' or 'params'.
    step: Which checkpoint; None for the newest.

  Raises:
    CheckpointError: There is no such checkpoint, or it is of another model.
  """
  checkpointer, latest = _open_latest(path)
  with checkpointer:
    found = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    step = latest if step is None else step
    if step not in found:
      raise CheckpointError(
        f'{path} no longer holds step {step}, only {found}: keep it there by '
        'config.checkpoint.keep_every_steps'
      )
    if shardings is None:
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = jax.tree.map(lambda _: here, abstract)
    wanted = _place(abstract, shardings)
    _check_model(checkpointer, step, item, wanted)
    with hide_orphans():
      return _read(checkpointer, step, {item: wanted})[item]


def load_initial(
  path: epath.PathLike, abstract: TrainState, shardings: TrainState
) -> TrainState | None:
  """Takes over parameters, target and moments of another run, at step 0.

  Args:
    path: Workdir of the run, of a stage that comes before this one.
    abstract, shardings: See `restore`.

  Returns:
    The state; None if there are weights alone, as converted ones.

  Raises:
    CheckpointError: There is no checkpoint, or it is of another model.
  """
  checkpointer, step = _open_latest(path)
  with checkpointer:
    with explain_damage(checkpointer.directory, step):
      items = checkpointer.checkpointables_metadata(step).metadata
    if 'params' in items and 'opt_state' not in items:
      return None
    state, _ = _load(checkpointer, step, abstract, shardings)
  logging.info('took over step %d of %s', step, path)
  return state.replace(step=jax.device_put(np.int32(0), shardings.step))
