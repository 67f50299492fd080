"""How much of a run's time was training, and what the rest went to."""

from collections.abc import Iterator, Mapping
import contextlib
import time

_KINDS = ('init', 'restore', 'compile', 'wait', 'evaluate', 'save', 'lost')


class Goodput:
  """Seconds by what they went to, over all lives of a run.

  What is none of the kinds is training. 'lost' are steps that were done again
  because no checkpoint had them.
  """

  def __init__(self):
    self._start = time.perf_counter()
    self._before = dict.fromkeys((*_KINDS, 'total'), 0.0)  # earlier lives
    self._seconds = dict.fromkeys(_KINDS, 0.0)

  def resume(self, seconds: Mapping[str, float]) -> None:
    """Adds seconds of earlier lives, as `measure` returned them."""
    for kind, value in seconds.items():
      self._before[kind] += value

  def add(self, kind: str, seconds: float) -> None:
    """Adds seconds of this life."""
    self._seconds[kind] += seconds

  @contextlib.contextmanager
  def spend(self, kind: str) -> Iterator[None]:
    """Adds the seconds that a block takes."""
    start = time.perf_counter()
    yield
    self.add(kind, time.perf_counter() - start)

  def start_training(self) -> None:
    """Takes what has passed until now, but for restoring, for 'init'."""
    passed = time.perf_counter() - self._start
    self.add('init', passed - sum(self._seconds.values()))

  def measure(self) -> dict[str, float]:
    """Returns all seconds by kind, and their 'total'."""
    own = self._seconds | {'total': time.perf_counter() - self._start}
    return {kind: value + self._before[kind] for kind, value in own.items()}

  def compute_shares(self) -> dict[str, float]:
    """Returns the share of training, 'goodput', and `share_KIND` of others."""
    seconds = self.measure()
    total = max(seconds.pop('total'), 1e-9)
    shares = {f'share_{kind}': x / total for kind, x in seconds.items()}
    return {'goodput': 1.0 - sum(shares.values())} | shares
