"""The training loop. Its order is a contract:

evaluate -> checkpoint -> next(feed) -> step -> write.

Only `next(feed)` moves the data position, after the checkpoint that stores it.
Metrics are read one step late, so that the host never waits for the device.
"""

from collections.abc import Callable
import dataclasses
import os
import tempfile
from typing import Any

from absl import logging
from etils import epath
import jax

from vjepa_jax.data import storage
from vjepa_jax.training.checkpoint import Checkpoints, Preemption
from vjepa_jax.training.diagnostics import summarize
from vjepa_jax.training.feed import Feed
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.step import TrainStep
from vjepa_jax.training.telemetry import Telemetry


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

  def __init__(self, cadence: Cadence, telemetry: Telemetry, feed: Feed):
    self._cadence = cadence
    self._telemetry = telemetry
    self._feed = feed
    self._pending = None
    self._skipped = 0

  def put(self, step: int, metrics: Any, statistics: Any) -> None:
    """Takes the metrics of a step that is under way; writes the last one's."""
    self.write()
    self._pending = (step, metrics, statistics)

  def write(self) -> None:
    """Writes what is pending, waiting for it if need be."""
    if self._pending is None:
      return
    step, metrics, statistics = self._pending
    self._pending = None
    self._check(step, bool(jax.device_get(metrics['skipped'])))
    if not self._cadence.logs(step):
      return
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if statistics is not None:
      values |= summarize(statistics)
    values |= self._telemetry.measure_rate(step)
    values['replaced_videos'] = self._feed.quarantine.count
    self._telemetry.write(step, values)

  def _check(self, step: int, skipped: bool) -> None:
    self._skipped = self._skipped + 1 if skipped else 0
    if skipped:
      logging.warning('step %d: loss or gradient not finite, skipped', step)
    if self._skipped >= self._cadence.max_skipped:
      raise FloatingPointError(
        f'loss or gradient not finite in steps {step - self._skipped + 1} to '
        f'{step}: go back to an earlier checkpoint, with a lower learning '
        'rate or a longer warm-up'
      )


def train(
  state: TrainState,
  train_step: TrainStep,
  feed: Feed,
  cadence: Cadence,
  *,
  start_step: int,
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
    checkpoints, telemetry: Where states and metrics go.
    diagnose: See `diagnostics`, jitted; None where the cadence has none.
    evaluate: Function of the state.

  Returns:
    The state after the last step; None if preempted, its state saved.
  """
  preemption = Preemption()
  metrics = _Metrics(cadence, telemetry, feed)
  for step in range(start_step, cadence.total_steps + 1):
    last = step == cadence.total_steps
    preempted = preemption.reached(step)
    # What was evaluated before an interruption is in the metrics already.
    fresh = step == 0 or step > start_step
    evaluates = evaluate is not None and cadence.evaluates(step) and fresh
    saves = last or preempted or checkpoints.is_due(step)
    if evaluates or saves:
      metrics.write()
    with telemetry.pause():
      if evaluates:
        telemetry.write(step, evaluate(state))
      if saves:
        telemetry.flush()
        checkpoints.save(step, state, feed.position)
    if last or preempted:
      if last:
        _profile(cadence, step, telemetry.workdir)  # of the last steps
      break
    batch = next(feed)
    _profile(cadence, step, telemetry.workdir)
    statistics = None
    # Whatever the step reads is on the devices already: a transfer would be a
    # mistake, and a slow one.
    with (
      jax.profiler.StepTraceAnnotation('train', step_num=step),
      jax.transfer_guard('disallow'),
    ):
      state, step_metrics = train_step(state, batch)
      if cadence.diagnoses(step + 1):
        statistics = diagnose(state.target, batch['video']['pixels'])
    metrics.put(step + 1, step_metrics, statistics)
    telemetry.advance(feed.wait_seconds)
  checkpoints.wait()
  if preempted and not last:
    logging.warning('preempted: saved step %d; run again to resume', step)
    return None
  return state


def _profile(cadence: Cadence, step: int, workdir: epath.Path) -> None:
  """Starts and ends the trace of the steps asked for."""
  if cadence.profile is None or jax.process_index():
    return
  first, last = cadence.profile
  traced = folder = f'{workdir}/profile'
  if storage.is_remote(folder):  # the profiler writes local files
    traced = f'{tempfile.gettempdir()}/profile-{os.getpid()}'
  if step == first:
    jax.profiler.start_trace(traced)
  elif step == last:
    jax.profiler.stop_trace()
    if storage.is_remote(folder):
      storage.upload_folder(traced, folder)
    logging.info('trace of steps %d to %d is in %s', first, last, folder)
