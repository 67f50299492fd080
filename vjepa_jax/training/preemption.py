"""When the platform wants the machine back."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Notices that the platform wants the machine back (SIGTERM).

  One process catches the signal itself; several agree through the coordination
  service on the step after which all of them save and leave. Outside of the
  context the signal ends the process.
  """

  def __init__(self):
    self._received = False

  def __enter__(self) -> 'Preemption':
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *error) -> None:
    # The coordination service's handler would swallow it too.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  def _receive(self, signum, frame):
    del signum, frame
    self._received = True

  def reached(self, step: int) -> bool:
    """Says whether to save and leave now; called by all processes."""
    if jax.process_count() == 1:
      return self._received
    return multihost_utils.reached_preemption_sync_point(step)
