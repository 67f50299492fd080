"""Is this run healthy? Rules over its metrics, in words.

"My loss rises, is my run OK?" has no answer in the loss: targets are features
that learn too, so that the loss rises when they get richer and falls when they
die. The rules look at what the targets carry (see `diagnostics`), at gradients
and at time, and each says what it saw and what to try.

The thresholds were set on the recorded runs of tests/training/recorded, to tell
those left in peace from those made to fail; docs/learning.md has their curves.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from statistics import fmean, median_high
from typing import Any

Metrics = Sequence[dict[str, Any]]

# Share of all variation that clips at one place must have: LayerNorm gives a
# token a variance of 1, of which content, position and a constant get parts.
# Some runs dip below the first and come back, none below the second.
_LOW_CONTENT = 0.2
_DEAD_CONTENT = 0.1
# Effective rank of tokens relative to the untrained encoder's. It dips in runs
# that work too, to about .65, and comes back.
_LOST_RANK = 0.5
# Times the largest gradient norm of the first half, and at least the norm that
# published recipes clip at.
_EXPLODED_GRADIENT = 20.0
_LARGE_GRADIENT = 10.0
_EXPLODED_LOSS = 1.5
_WAITING_SHARE = 0.3
_REPLACED_SHARE = 0.02
_STILL_LOSS = 0.02
_STILL_RANK = 0.05
_MIN_DIAGNOSES = 4
_PROBE_DROP = 0.05

_VERDICTS = {
  'fine': 'is healthy',
  'warning': 'needs a look',
  'failing': 'is failing',
}


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a rule found."""

  state: str  # its name, for programs: 'collapse', 'rank loss', ...
  severity: str  # 'fine', 'warning' or 'failing'
  evidence: str  # the numbers, in words
  remedy: str = ''  # what to try

  def __str__(self) -> str:
    text = f'{self.state}: {self.evidence}'
    return f'{text}. Try: {self.remedy}' if self.remedy else text


def find(metrics: Metrics) -> list[Finding]:
  """Applies all rules to the metrics of a run, worst finding first.

  Args:
    metrics: Lines of metrics.jsonl, oldest first.

  Returns:
    At least one finding: 'learning' or 'too early' where nothing is wrong.
  """
  found = [finding for rule in RULES if (finding := rule(metrics)) is not None]
  found.sort(key=lambda f: -list(_VERDICTS).index(f.severity))
  diagnosed = [line for line in metrics if 'effective_rank' in line]
  if found:
    return found
  if len(diagnosed) >= _MIN_DIAGNOSES:
    return [_describe_learning(metrics, diagnosed[0], diagnosed[-1])]
  evidence = (
    f'the targets were measured {len(diagnosed)} times, {_MIN_DIAGNOSES} are '
    'needed'
  )
  return [Finding('too early', 'fine', evidence)]


def judge(findings: Sequence[Finding]) -> str:
  """Says in a sentence what the findings, worst first, come to."""
  if findings[0].state == 'too early':
    return 'It is too early to say.'
  return f'This run {_VERDICTS[findings[0].severity]}.'


def format_findings(findings: Sequence[Finding]) -> str:
  """Formats findings, one a line, with a verdict on top."""
  return '\n'.join([judge(findings), *map(str, findings)])


def _select(metrics: Metrics, name: str) -> list[float]:
  """Values of one metric."""
  return [line[name] for line in metrics if name in line]


def _select_losses(metrics: Metrics) -> list[float]:
  """Losses; on what is hidden alone where the weight of the rest may rise."""
  has_context = bool(_select(metrics, 'loss_context'))
  return _select(metrics, 'loss_prediction' if has_context else 'loss')


def _average_ends(values: list[float]) -> tuple[float, float]:
  """Means of the first and of the last values."""
  return fmean(values[:_MIN_DIAGNOSES]), fmean(values[-_MIN_DIAGNOSES:])


def _find_divergence(metrics: Metrics) -> Finding | None:
  """Gradients that explode, or updates that had to be skipped."""
  losses = _select(metrics, 'loss')
  norms = _select(metrics, 'gradient_norm_encoder')
  broken = [
    line['step']
    for line in metrics
    if line.get('skipped') or not math.isfinite(line.get('loss', 0.0))
  ]
  diverged = functools.partial(
    Finding,
    'divergence',
    'failing',
    remedy='a lower learning_rate.value, a longer learning_rate.warmup_steps, '
    'or clip_norm',
  )
  if broken:
    return diverged(
      f'loss or gradient not finite at {len(broken)} of {len(losses)} logged '
      f'steps, first at step {broken[0]}'
    )
  if len(norms) < 2 * _MIN_DIAGNOSES:
    return None
  usual = max(norms[: len(norms) // 2])
  norm = median_high(norms[-_MIN_DIAGNOSES:])
  if norm > max(_EXPLODED_GRADIENT * usual, _LARGE_GRADIENT):
    return diverged(
      f'the gradient norm of the encoder is {norm:.3g}, {norm / usual:.0f} '
      'times the largest of the first half'
    )
  parts = _select_losses(metrics), _select(metrics, 'image/loss_prediction')
  for first, last in map(_average_ends, filter(None, parts)):
    if last > _EXPLODED_LOSS * first:
      return diverged(
        f'the loss is {last:.3g}, {last / first:.1f} times that of the start, '
        'more than any richness of the targets explains'
      )
  return None


def _find_collapse(metrics: Metrics) -> Finding | None:
  """Targets that are alike for all clips: a constant, or position only."""
  diagnosed = [line for line in metrics if 'content_std' in line]
  contents = _select(diagnosed, 'content_std')
  if len(contents) < _MIN_DIAGNOSES or max(contents[-2:]) >= _LOW_CONTENT:
    return None
  content = fmean(contents[-2:])
  position = fmean(_select(diagnosed, 'position_std')[-2:])
  momentum = _select(metrics, 'ema')
  chases = f' (it is {momentum[-1]:.4g})' if momentum else ''
  return Finding(
    'position only' if position > 2 * content else 'collapse',
    'failing' if max(contents[-2:]) < _DEAD_CONTENT else 'warning',
    f'clips differ by {content:.3f} at a given place, of {contents[0]:.2f} at '
    f'step {diagnosed[0]["step"]}, places by {position:.3f}: the targets no '
    'longer tell clips apart, whatever the loss does',
    f"a higher ema.value{chases}, objective.vjepa.target_norm='position', a "
    'lower learning rate, or a variance term',
  )


def _find_rank_loss(metrics: Metrics) -> Finding | None:
  """Targets that use ever fewer directions, while their deviation is fine."""
  diagnosed = [line for line in metrics if 'effective_rank' in line]
  ranks = _select(diagnosed, 'effective_rank')
  if len(ranks) < _MIN_DIAGNOSES or max(ranks[-2:]) >= _LOST_RANK * ranks[0]:
    return None
  return Finding(
    'rank loss',
    'failing' if max(ranks[-2:]) < 0.5 * _LOST_RANK * ranks[0] else 'warning',
    f'the targets use {fmean(ranks[-2:]):.1f} directions, {ranks[0]:.1f} at '
    f'step {diagnosed[0]["step"]}: only what is easiest to predict is left',
    'a lower learning rate, masks whose content can be seen elsewhere (random '
    'tubelets, future), encoder.init_std near 1 / sqrt(width), or a variance '
    'and covariance term',
  )


def _find_stall(metrics: Metrics) -> Finding | None:
  """Neither loss nor targets have moved since the start."""
  losses = _select_losses(metrics)
  ranks = _select(metrics, 'effective_rank')
  if len(ranks) < _MIN_DIAGNOSES or len(losses) < 4 * _MIN_DIAGNOSES:
    return None
  first, last = _average_ends(losses)
  still = abs(last / first - 1) < _STILL_LOSS
  if not still or abs(fmean(ranks[-2:]) / ranks[0] - 1) > _STILL_RANK:
    return None
  rates = _select(metrics, 'learning_rate')
  at = f', the learning rate is {rates[-1]:.2g}' if rates else ''
  return Finding(
    'stall',
    'warning',
    f'the loss is {last:.4g} as at the start ({first:.4g}), and the targets '
    f'have not changed{at}',
    'a higher learning_rate.value, or a shorter warm-up',
  )


def _find_probe_loss(metrics: Metrics) -> Finding | None:
  """Features that tell less than those of the untrained encoder."""
  # An attentive probe sees what means over tokens hide.
  kind, names = 'linear', ('probe_knn', 'probe_linear')
  remedy = (
    'the attentive probe (config.probe.attentive_labels), which sees what '
    'means over tokens hide; if it falls too, treat as rank loss'
  )
  if _select(metrics, 'probe_attentive'):
    kind, names, remedy = (
      'attentive',
      ('probe_attentive',),
      'treat as rank loss',
    )
  for name in names:
    scores = _select(metrics, name)
    if len(scores) < 3 or max(scores[-2:]) > scores[0] - _PROBE_DROP:
      return None
  step = [line['step'] for line in metrics if names[-1] in line][-1]
  return Finding(
    'probes below their start',
    'warning',
    f'{kind} accuracy is {scores[-1]:.3f} at step {step}, {scores[0]:.3f} '
    'before the first',
    remedy,
  )


def _find_starvation(metrics: Metrics) -> Finding | None:
  """Devices that wait for data."""
  shares = [
    min(line['data_wait_seconds'] / max(line['seconds_per_step'], 1e-9), 1.0)
    for line in metrics
    if 'data_wait_seconds' in line
  ]
  if len(shares) < _MIN_DIAGNOSES:
    return None
  # Not the mean: the first line of a run has its compilation in it.
  share = median_high(shares[-2 * _MIN_DIAGNOSES :])
  if share < _WAITING_SHARE:
    return None
  return Finding(
    'starved',
    'warning',
    f'{share:.0%} of the time is spent waiting for data',
    'more data.num_workers, videos prepared by vjepa_jax.tools.prepare, or '
    'storage nearer by',
  )


def _find_replaced(metrics: Metrics) -> Finding | None:
  """Too many videos that cannot be read."""
  counted = [line for line in metrics if 'replaced_videos' in line]
  if not counted:
    return None
  last = counted[-1]
  rate = last['clips_per_second'] + last.get('images_per_second', 0)
  clips = last['step'] * rate * last['seconds_per_step']
  share = last['replaced_videos'] / max(clips, 1)
  if share < _REPLACED_SHARE:
    return None
  return Finding(
    'videos replaced',
    'warning',
    f'{last["replaced_videos"]:.0f} videos, {share:.1%} of the clips, could '
    'not be read and were replaced',
    'quarantine.jsonl in the workdir, which names them',
  )


def _judge_predictions(metrics: Metrics) -> Finding | None:
  """A model with actions whose predictions are worse than the frame before."""
  held_out = [line for line in metrics if 'held_out_loss_copy' in line]
  lines = held_out or [line for line in metrics if 'loss_copy' in line]
  if len(lines) < (2 if held_out else _MIN_DIAGNOSES):
    return None
  prefix = 'held_out_' if held_out else ''
  shares = [
    line[f'{prefix}loss_teacher_forcing']
    / max(line[f'{prefix}loss_copy'], 1e-9)
    for line in lines
  ]
  share = fmean(shares[-(1 if held_out else _MIN_DIAGNOSES) :])
  clips = 'held-out clips' if held_out else 'clips of training'
  evidence = (
    f'the next frame of {clips} is predicted with {share:.2f} of the error of '
    'the frame before'
  )
  if share < 1:
    return Finding('predicting', 'fine', evidence)
  if len(lines) < 4 * _MIN_DIAGNOSES:  # every run starts above 1
    return Finding('too early', 'fine', evidence)
  return Finding(
    'copying would do',
    'warning',
    evidence,
    'more steps, a higher learning_rate.value, or frames that are further '
    'apart (clip.fps)',
  )


def _describe_learning(
  metrics: Metrics, first: dict[str, Any], last: dict[str, Any]
) -> Finding:
  """Says what the loss means in a run without a finding."""
  losses = _select_losses(metrics)
  size = max(1, len(losses) // 10)
  starts = range(0, len(losses) - size + 1, size)
  low = min(fmean(losses[i : i + size]) for i in starts)
  end = fmean(losses[-size:])
  evidence = (
    f'clips differ by {last["content_std"]:.2f} at a given place '
    f'({first["content_std"]:.2f} at step {first["step"]}), the targets use '
    f'{last["effective_rank"]:.1f} directions ({first["effective_rank"]:.1f})'
  )
  if end > 1.05 * low:
    evidence += (
      f'. The loss rose from {low:.3g} to {end:.3g}, which is no harm: richer '
      'targets are harder to predict'
    )
  return Finding('learning', 'fine', evidence)


# Each takes the metrics of a run; the first line of its docstring says what it
# looks for.
RULES = (
  _find_divergence,
  _find_collapse,
  _find_rank_loss,
  _find_stall,
  _find_probe_loss,
  _find_starvation,
  _find_replaced,
  _judge_predictions,
)
