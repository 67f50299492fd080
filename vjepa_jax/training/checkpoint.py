"""Checkpoints: written in the background, whole or not at all."""

from collections.abc import Mapping
import hashlib
import signal
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

from vjepa_jax.data import storage
from vjepa_jax.training.state import TrainState

_TREES = ('params', 'target', 'opt_state')


class CheckpointError(ValueError):
  """A checkpoint that cannot be used; the message says why and what to do."""


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
) -> tuple[TrainState, int]:
  """Loads the state of a step, and the data position."""
  wanted = _get_trees(_place(abstract, shardings))
  for item in ('params', 'opt_state'):
    _check_model(checkpointer, step, item, wanted[item])
  items = checkpointer.load_checkpointables(
    step, {**wanted, 'position': {'samples': 0}}
  )
  state = TrainState(
    step=jax.device_put(np.int32(step), shardings.step),
    **{name: items.get(name) for name in _TREES},
  )
  return state, int(items['position']['samples'])


def _get_trees(state: TrainState) -> dict[str, Any]:
  """Returns the items that a state has; fine-tuning has no target."""
  trees = {name: getattr(state, name) for name in _TREES}
  return {name: tree for name, tree in trees.items() if tree is not None}


def read_model(path: epath.PathLike) -> tuple[int, dict[str, Any]]:
  """Reads which model the newest checkpoint of a workdir is of.

  Returns:
    The step of the checkpoint, and what `Checkpoints` was given as `model`.

  Raises:
    CheckpointError: There is no checkpoint.
  """
  checkpointer, step = _open_latest(path)
  with checkpointer:
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

  def save(self, step: int, state: TrainState, position: int) -> None:
    """Starts to save, unless this step is saved; `wait` ends it.

    Args:
      step: Steps done, known to the host without waiting for the device.
      state: The state; its buffers may be donated as soon as this returns.
      position: Samples consumed, see `Feed.position`.

    Raises:
      Exception: What went wrong in an earlier save.
    """
    if step == self.latest_step():
      return
    self._checkpointer.save_checkpointables_async(
      step,
      {**_get_trees(state), 'position': {'samples': position}},
      custom_metadata=self._metadata,
    )

  def restore(
    self, abstract: TrainState, shardings: TrainState
  ) -> tuple[TrainState, int] | None:
    """Restores the newest checkpoint onto any mesh.

    Args:
      abstract, shardings: Shapes of the state, and where its leaves go.

    Returns:
      The state and the data position, or None if there is no checkpoint.

    Raises:
      CheckpointError: The checkpoint is of another model.
    """
    step = self.latest_step()
    if step is None:
      return None
    restored = _load(self._checkpointer, step, abstract, shardings)
    logging.info('resumed from step %d', step)
    return restored

  def check_data(self, accepted: bool) -> None:
    """Compares the data with that of the newest checkpoint, if it says.

    Raises:
      CheckpointError: It is another, and that is not accepted.
    """
    step, now = self.latest_step(), self._metadata['data']
    found = self._checkpointer.checkpointables_metadata(step).custom_metadata
    before = (found or {}).get('data') or now
    changes = [
      f'{name} was {before.get(name)} and is {now.get(name)}'
      for name in sorted(before | now)
      if before.get(name) != now.get(name)
    ]
    if not changes:
      return
    message = f'the data is not that of step {step}: {"; ".join(changes)}'
    if not accepted:
      raise CheckpointError(
        f'{message}. If that is meant, --config.data.changed=True accepts it'
      )
    logging.warning('%s', message)

  def wait(self) -> None:
    """Waits until what was started is saved; raises what went wrong."""
    self._checkpointer.wait()

  def close(self) -> None:
    """Finishes and closes."""
    self._checkpointer.close()


class Preemption:
  """Notices that the platform wants the machine back (SIGTERM).

  One process catches the signal itself; several agree through the coordination
  service on the step after which all of them save and leave.
  """

  def __init__(self):
    self._received = False
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._receive)

  def _receive(self, signum, frame):
    del signum, frame
    self._received = True

  def reached(self, step: int) -> bool:
    """Says whether to save and leave now; called by all processes."""
    if jax.process_count() == 1:
      return self._received
    return multihost_utils.reached_preemption_sync_point(step)


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
    return checkpointer.load_checkpointables(step, {item: wanted})[item]


def load_initial(
  path: epath.PathLike, abstract: TrainState, shardings: TrainState
) -> TrainState | None:
  """Takes over parameters, target and moments of another run, at step 0.

  Args:
    path: Workdir of the run, of a stage that comes before this one.
    abstract, shardings: See `Checkpoints.restore`.

  Returns:
    The state; None if there are weights alone, as converted ones.

  Raises:
    CheckpointError: There is no checkpoint, or it is of another model.
  """
  checkpointer, step = _open_latest(path)
  with checkpointer:
    if 'opt_state' not in checkpointer.checkpointables_metadata(step).metadata:
      return None
    state, _ = _load(checkpointer, step, abstract, shardings)
  logging.info('took over step %d of %s', step, path)
  return state.replace(step=jax.device_put(np.int32(0), shardings.step))


def hash_params(params: Any) -> str:
  """Hashes parameters: a backbone that trains on under its name is another."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return digest.hexdigest()
