"""The training loop. Its order is a contract:

evaluate -> checkpoint -> next(feed) -> step -> write.

A preemption saves first, and leaves the evaluation to the run that resumes.
Only `next(feed)` moves the data position, after the checkpoint that stores it.
Metrics are read one step late, so that the host never waits for the device.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import os
import tempfile
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.parallel import hosts
from vjepa_jax.training.checkpoint import Checkpoints
from vjepa_jax.training.diagnostics import summarize
from vjepa_jax.training.feed import Feed
from vjepa_jax.training.preemption import Preemption
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.step import TrainStep
from vjepa_jax.training.telemetry import Telemetry

_NO_PAUSE = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Cadence:
  """How often things happen, in steps; 0 for never."""

  total_steps: int
  log_every: int = 1
  diagnose_every: int = 100  # also after the first step
  evaluate_every: int = 0  # also before the first step and after the last
  max_skipped: int = 20  # non-finite updates in a row that end the run
  profile: tuple[int, int] | None = None  # first and last step of a trace

  def diagnoses(self, step: int) -> bool:
    """Says whether collapse statistics are due after `step` steps."""
    every = self.diagnose_every
    return bool(every) and (step == 1 or step % every == 0)

  def logs(self, step: int) -> bool:
    """Says whether metrics are due after `step` steps."""
    return (
      step % self.log_every == 0
      or step == self.total_steps
      or self.diagnoses(step)
    )

  def evaluates(self, step: int) -> bool:
    """Says whether an evaluation is due after `step` steps."""
    every = self.evaluate_every
    return bool(every) and (step % every == 0 or step == self.total_steps)


class _Metrics:
  """Reads metrics when the next step is under way, and stops a lost run."""

  def __init__(
    self,
    cadence: Cadence,
    telemetry: Telemetry,
    feed: Feed,
    start_step: int,
    progress: Mapping[str, Any],
  ):
    self._cadence, self._telemetry, self._feed = cadence, telemetry, feed
    self._replaced = progress.get('replaced', 0)  # before this process
    self._skipped = progress.get('skipped', 0)
    counts = start_step, self._skipped, 0, 0
    self._counts = tuple(np.int32(count) for count in counts)
    self._pending = None

  def put(self, step: int, metrics: Any, statistics: Any) -> None:
    """Takes the metrics of a step that is under way; writes the last one's."""
    self.write()
    # Batches of steps that are not under way yet would fill the devices.
    jax.block_until_ready(self._counts)
    self._counts = _count_skipped(
      self._counts, metrics['skipped'], self._cadence.max_skipped
    )
    if self._cadence.logs(step):
      everywhere = self._gather(self._telemetry.take_wait())
      self._pending = step, metrics, statistics, self._counts, everywhere

  def write(self) -> None:
    """Writes what is pending, waiting for it if need be."""
    if self._pending is None:
      return
    step, *arrays = self._pending
    self._pending = None
    metrics, statistics, counts, everywhere = jax.device_get(arrays)
    self._check(step, int(counts[1]), int(counts[3]))
    values = {name: float(value) for name, value in metrics.items()}
    if statistics is not None:
      values |= summarize(statistics)
    values |= self._telemetry.measure_rate(step)
    waits, replaced = np.transpose(everywhere)
    values |= {
      'data_wait_seconds': float(waits.max()),
      'replaced_videos': self._replaced + int(replaced.sum()),
      'skipped_steps': self._skipped,
    }
    if len(waits) > 1:
      values['data_wait_host'] = int(waits.argmax())
    self._telemetry.write(step, values)

  def summarize(self, evaluated: bool) -> dict[str, Any]:
    """Says how far all hosts and lives of the run have come, for a checkpoint.

    Args:
      evaluated: Whether an evaluation that is due has been done.
    """
    _, replaced = np.transpose(jax.device_get(self._gather(0.0)))
    return self._feed.progress | {
      'replaced': self._replaced + int(replaced.sum()),
      'skipped': int(self._counts[1]),
      'evaluated': evaluated,
      'seconds': self._telemetry.goodput.measure(),
    }

  def _gather(self, wait: float) -> Any:
    """Starts to collect what each host has measured, `[hosts, 2]`.

    Behind the step that is under way: the host need not wait.
    """
    own = np.float32([wait, self._feed.quarantine.count])
    if jax.process_count() == 1:
      return own[None]
    return hosts.gather_rows(own, jax.sharding.get_mesh())

  def _check(self, step: int, skipped: int, hopeless: int) -> None:
    if skipped > self._skipped:
      logging.warning(
        'step %d: loss or gradient not finite in %d steps since the last line, '
        'which were skipped',
        step,
        skipped - self._skipped,
      )
    self._skipped = skipped
    if hopeless:
      raise FloatingPointError(
        'loss or gradient not finite in steps '
        f'{hopeless - self._cadence.max_skipped + 1} to {hopeless}: go back to '
        'an earlier checkpoint, with a lower learning rate or a longer warm-up'
      )


@functools.partial(jax.jit, static_argnums=2)
def _count_skipped(counts, skipped, max_skipped):
  """Counts steps, those that were skipped, those in a row, on the devices.

  Last comes the step at which so many were skipped in a row as are too many.
  """
  step, total, row, hopeless = counts
  skipped = skipped.astype(jnp.int32)
  step, total, row = step + 1, total + skipped, (row + 1) * skipped
  too_many = (row >= max_skipped) & (hopeless == 0)
  return step, total, row, jnp.where(too_many, step, hopeless)


class _Trace:
  """The trace of some steps, by one host; it ends with the context."""

  def __init__(self, steps: tuple[int, int] | None, workdir: epath.Path):
    self._steps = steps
    self._traced = self._folder = f'{workdir}/profile'
    if storage.is_remote(self._folder):  # the profiler writes local files
      self._traced = f'{tempfile.gettempdir()}/profile-{os.getpid()}'
    self._first = None  # step, while the trace is on

  def __enter__(self) -> '_Trace':
    return self

  def __exit__(self, *error) -> None:
    self._stop()

  def update(self, step: int) -> None:
    """Starts or ends the trace, if it is time."""
    if self._steps is None or jax.process_index():
      return
    first, last = self._steps
    if self._first is None and first <= step < last:  # resumed inside of it?
      self._first = step
      jax.profiler.start_trace(self._traced)
    elif step >= last:
      self._stop(last)

  def _stop(self, last: int | None = None) -> None:
    if self._first is None:
      return
    jax.profiler.stop_trace()
    if self._traced != self._folder:
      storage.upload_folder(self._traced, self._folder)
    logging.info(
      'trace of steps %d to %s is in %s',
      self._first,
      last or 'where it was interrupted',
      self._folder,
    )
    self._first = None


def train(
  state: TrainState,
  train_step: TrainStep,
  feed: Feed,
  cadence: Cadence,
  *,
  start_step: int,
  progress: Mapping[str, Any],
  checkpoints: Checkpoints,
  telemetry: Telemetry,
  diagnose: Callable[[Any, jax.Array], Any] | None = None,
  evaluate: Callable[[TrainState], dict[str, float]] | None = None,
) -> TrainState | None:
  """Trains to the end, or until the platform wants the machine back.

  Args:
    state: State after `start_step` steps; donated.
    train_step: The jitted step.
    feed: Batches, at the position that belongs to the state.
    cadence: How often things happen.
    start_step: Steps done, more than 0 for a resumed run.
    progress: What `checkpoint.restore` returned with the state; {} for none.
    checkpoints, telemetry: Where states and metrics go.
    diagnose: See `diagnostics`, jitted; None where the cadence has none.
    evaluate: Function of the state.

  Returns:
    The state after the last step; None if preempted, its state saved.
  """
  metrics = _Metrics(cadence, telemetry, feed, start_step, progress)
  evaluated = progress.get('evaluated', start_step > 0)
  telemetry.goodput.start_training()
  with (
    Preemption() as preemption,
    _Trace(cadence.profile, telemetry.workdir) as trace,
  ):
    for step in range(start_step, cadence.total_steps + 1):
      last = step == cadence.total_steps
      due = evaluate is not None and cadence.evaluates(step) and not evaluated
      # Who wants the machine back does not wait for an evaluation.
      preempted = preemption.reached(step) and (due or not last)
      saves = last or preempted or checkpoints.is_due(step)
      if due or saves:
        metrics.write()
      if due and not preempted:
        with telemetry.pause('evaluate'):
          telemetry.write(step, evaluate(state))
      if saves:
        with telemetry.pause('save'):
          telemetry.flush()
          evaluated = not (due and preempted)
          checkpoints.save(step, state, metrics.summarize(evaluated))
      if last or preempted:
        trace.update(step)  # it may end here
        break
      batch = next(feed)
      telemetry.count_step(feed.wait_seconds)
      trace.update(step)
      statistics = None
      # Whatever the step reads is on the devices already: a transfer would be a
      # mistake, and a slow one.
      with (
        telemetry.pause('compile') if step == start_step else _NO_PAUSE,
        jax.profiler.StepTraceAnnotation('train', step_num=step),
        jax.transfer_guard('disallow'),
      ):
        state, step_metrics = train_step(state, batch)
        if cadence.diagnoses(step + 1):
          statistics = diagnose(state.target, batch['video']['pixels'])
      metrics.put(step + 1, step_metrics, statistics)
      evaluated = False
    checkpoints.wait()
  if preempted:
    logging.warning('preempted: saved step %d; run again to resume', step)
    return None
  return state
