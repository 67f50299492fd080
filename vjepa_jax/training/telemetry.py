"""Metrics to JSON lines and TensorBoard, a progress bar, and warnings."""

from concurrent import futures
import contextlib
import json
import statistics
import time
from typing import Any

from absl import logging
from etils import epath
import jax

from vjepa_jax.data import storage
from vjepa_jax.progress import make_bar
from vjepa_jax.training import health
from vjepa_jax.training.events import open_writer
from vjepa_jax.training.goodput import Goodput

_FLUSH_SECONDS = 5.0
# Remote storage takes whole files alone.
_REMOTE_FLUSH_SECONDS = 60.0


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Reads the lines of `metrics.jsonl`, oldest first; [] if there is none."""
  path = epath.Path(workdir) / 'metrics.jsonl'
  if not path.exists():
    return []
  # A run that was killed, or that is writing now, can leave half a line.
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith('\n')]


class Telemetry:
  """Writes metrics and shows progress; processes other than 0 do neither."""

  def __init__(
    self,
    workdir: epath.Path,
    *,
    start_step: int,
    total_steps: int,
    clips_per_step: int,
    images_per_step: int = 0,
    goodput: Goodput | None = None,
  ):
    """Continues the metrics of a run.

    Args:
      workdir: Directory of the run.
      start_step: Steps done; lines of later steps, which an interrupted run
        left behind, are dropped, for they will be written again.
      total_steps: Steps of the whole run.
      clips_per_step: Clips a step, over all hosts.
      images_per_step: Images beside them.
      goodput: Of the run; None for one that begins now.
    """
    self.workdir = workdir
    self._active = jax.process_index() == 0
    self._path = workdir / 'metrics.jsonl'
    self._per_step = {'clips': clips_per_step}
    if images_per_step:
      self._per_step['images'] = images_per_step
    self.goodput = goodput or Goodput()
    self._paused = self._wait = 0.0
    self._steps = 0  # since the wait was taken
    self._last = (start_step, time.perf_counter(), 0.0)
    if not self._active:
      return
    workdir.mkdir(parents=True, exist_ok=True)
    before = read_metrics(workdir)
    self._metrics = [line for line in before if line['step'] <= start_step]
    lost = _measure_lost(before, start_step)
    self.goodput.resume({'lost': lost, 'total': lost})
    storage.replace(self._path, _join(self._metrics))
    self._written = len(self._metrics)  # lines that are on disk, or on the way
    # Writing takes as long as storage does, for which no step waits.
    self._writer_thread = futures.ThreadPoolExecutor(1)
    self._writing = self._writer_thread.submit(lambda: None)
    self._reported = set()
    self._flushed = time.perf_counter()
    remote = storage.is_remote(workdir)
    self._flush_seconds = _REMOTE_FLUSH_SECONDS if remote else _FLUSH_SECONDS
    self._writer = open_writer(str(workdir / 'tensorboard'), start_step + 1)
    self._bar = make_bar(total=total_steps, initial=start_step, unit='step')

  def count_step(self, wait_seconds: float) -> None:
    """Counts a step that waited this long for its data."""
    self._wait += wait_seconds
    self._steps += 1
    self.goodput.add('wait', wait_seconds)
    if self._active:
      self._bar.update()

  def take_wait(self) -> float:
    """Returns the mean wait for data of a step since the last call."""
    wait = self._wait / max(self._steps, 1)
    self._wait, self._steps = 0.0, 0
    return wait

  @contextlib.contextmanager
  def pause(self, kind: str):
    """Leaves out of the rate what is no training, see `Goodput`."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    self._paused += seconds
    self.goodput.add(kind, seconds)

  def measure_rate(self, step: int) -> dict[str, float]:
    """Measures speed since the last call, pauses left out."""
    last_step, last_time, last_paused = self._last
    self._last = step, time.perf_counter(), self._paused
    seconds = self._last[1] - last_time - (self._paused - last_paused)
    steps = max(step - last_step, 1)
    rate = {'seconds_per_step': seconds / steps}
    for name, count in self._per_step.items():
      rate[f'{name}_per_second'] = count * steps / max(seconds, 1e-9)
    return rate | self.goodput.compute_shares()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes one line of metrics, floats, for a number of steps done."""
    if not self._active:
      return
    self._metrics.append({'step': step, **metrics})
    for name, value in metrics.items():
      self._writer.add_scalar(name, value, step)
    if 'loss' in metrics:
      rates = [
        f'{metrics.get(f"{name}_per_second", 0):.1f} {name}/s, '
        for name in self._per_step
      ]
      self._bar.set_postfix_str(
        f'loss {metrics["loss"]:.4f}, {"".join(rates)}'
        f'waits {metrics.get("data_wait_seconds", 0):.2f} s for data',
        refresh=False,
      )
    if 'effective_rank' in metrics:
      self._warn(step)
    if time.perf_counter() - self._flushed > self._flush_seconds:
      self._start_writing()

  def _warn(self, step: int) -> None:
    """Logs what the health rules find, each state when it begins."""
    findings = health.find(self._metrics)
    found = {f.state: f for f in findings if f.severity != 'fine'}
    for state, finding in found.items():
      if state not in self._reported:
        logging.warning('step %d: %s', step, finding)
    for state in sorted(self._reported - found.keys()):
      logging.info('step %d: no longer %s', step, state)
    self._reported = set(found)

  def _start_writing(self) -> None:
    """Appends new lines to the file in the background; raises what failed."""
    if self._writing.done():
      self._writing.result()
      new = self._metrics[self._written :]
      self._written = len(self._metrics)
      self._writing = self._writer_thread.submit(
        storage.append, self._path, _join(new)
      )
      self._flushed = time.perf_counter()

  def flush(self) -> None:
    """Brings everything written so far to disk."""
    if not self._active:
      return
    futures.wait([self._writing])
    self._start_writing()
    self._writing.result()
    self._writer.flush()

  def close(self) -> None:
    """Flushes and closes."""
    if self._active:
      self.flush()
      self._writer_thread.shutdown()
      self._writer.close()
      self._bar.close()
      logging.info('metrics are in %s', self._path)
      findings = health.find(self._metrics)
      diagnosed = any('effective_rank' in line for line in self._metrics)
      if diagnosed or findings[0].severity != 'fine':
        logging.info('%s', health.format_findings(findings))


def _join(lines: list[dict[str, Any]]) -> str:
  return ''.join(json.dumps(line) + '\n' for line in lines)


def _measure_lost(metrics: list[dict[str, Any]], start_step: int) -> float:
  """Estimates the seconds of steps after the one that a run goes on from."""
  times = [m['seconds_per_step'] for m in metrics if 'seconds_per_step' in m]
  steps = max((line['step'] for line in metrics), default=0) - start_step
  return statistics.median(times) * steps if times and steps > 0 else 0.0
