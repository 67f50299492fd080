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
import math
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
_LAST_DIAGNOSES = 2
# Times the largest gradient norm of the first half, and at least the norm that
# published recipes clip at.
_EXPLODED_GRADIENT = 20.0
_LARGE_GRADIENT = 10.0
_WAITING_SHARE = 0.3
_REPLACED_SHARE = 0.02
_STILL_LOSS = 0.02
_STILL_RANK = 0.05
_MIN_DIAGNOSES = 4
_PROBE_DROP = 0.05

SEVERITIES = ('fine', 'warning', 'failing')


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a rule found.

  Attributes:
    state: Name of the state, for programs: 'collapse', 'rank loss', ...
    severity: One of `SEVERITIES`.
    evidence: The numbers, in words.
    remedy: What to try; empty if nothing is wrong.
  """

  state: str
  severity: str
  evidence: str
  remedy: str = ''

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
  found.sort(key=lambda f: -SEVERITIES.index(f.severity))
  diagnosed = [line for line in metrics if 'effective_rank' in line]
  if not found and len(diagnosed) < _MIN_DIAGNOSES:
    return [
      Finding(
        'too early',
        'fine',
        f'the targets were measured {len(diagnosed)} times, {_MIN_DIAGNOSES} '
        'are needed',
      )
    ]
  if all(f.severity == 'fine' for f in found):
    found.append(_describe_learning(metrics, diagnosed))
  return found


def judge(findings: Sequence[Finding]) -> str:
  """Says in a sentence what the findings, worst first, come to."""
  if findings[0].state == 'too early':
    return 'It is too early to say.'
  verdict = {
    'fine': 'is healthy',
    'warning': 'needs a look',
    'failing': 'is failing',
  }[findings[0].severity]
  return f'This run {verdict}.'


def format_findings(findings: Sequence[Finding]) -> str:
  """Formats findings, one a line, with a verdict on top."""
  return '\n'.join([judge(findings), *map(str, findings)])


def _column(metrics: Metrics, name: str) -> list[tuple[int, float]]:
  """Steps and values of one metric."""
  return [(line['step'], line[name]) for line in metrics if name in line]


def _mean(points: Sequence[tuple[int, float]]) -> float:
  return sum(value for _, value in points) / len(points)


def _ends(
  metrics: Metrics, name: str
) -> tuple[tuple[int, float], float, float] | None:
  """First point, and mean and largest of the last diagnoses; None if early."""
  points = _column(metrics, name)
  if len(points) < _MIN_DIAGNOSES:
    return None
  last = points[-_LAST_DIAGNOSES:]
  return points[0], _mean(last), max(value for _, value in last)


def _find_divergence(metrics: Metrics) -> Finding | None:
  """Gradients that explode, or updates that had to be skipped."""
  remedy = (
    'a lower learning_rate.value, a longer learning_rate.warmup_steps, or '
    'clip_norm'
  )
  skipped = [step for step, value in _column(metrics, 'skipped') if value]
  losses = _column(metrics, 'loss')
  broken = [step for step, value in losses if not math.isfinite(value)]
  if skipped or broken:
    return Finding(
      'divergence',
      'failing',
      f'loss or gradient not finite at {len(set(skipped + broken))} of '
      f'{len(losses)} logged steps, first at step {min(skipped + broken)}',
      remedy,
    )
  norms = _column(metrics, 'gradient_norm_encoder')
  if len(norms) < 2 * _MIN_DIAGNOSES:
    return None
  usual = max(value for _, value in norms[: len(norms) // 2])
  recent = sorted(value for _, value in norms[-_MIN_DIAGNOSES:])
  now = recent[len(recent) // 2]
  if now > max(_EXPLODED_GRADIENT * usual, _LARGE_GRADIENT):
    return Finding(
      'divergence',
      'failing',
      f'the gradient norm of the encoder is {now:.3g}, {now / usual:.0f} times '
      'the largest of the first half',
      remedy,
    )
  first = _mean(losses[:_MIN_DIAGNOSES])
  last = _mean(losses[-_MIN_DIAGNOSES:])
  if last > 1.5 * first:
    return Finding(
      'divergence',
      'failing',
      f'the loss is {last:.3g}, {last / first:.1f} times that of the start, '
      'more than any richness of the targets explains',
      remedy,
    )
  return None


def _find_collapse(metrics: Metrics) -> Finding | None:
  """Targets that are alike for all clips: a constant, or position only."""
  ends = _ends(metrics, 'content_std')
  if ends is None or ends[2] >= _LOW_CONTENT:
    return None
  position = _mean(_column(metrics, 'position_std')[-_LAST_DIAGNOSES:])
  kind = 'position only' if position > 2 * ends[1] else 'collapse'
  momentum = _column(metrics, 'ema')
  chases = f' (it is {momentum[-1][1]:.4g})' if momentum else ''
  return Finding(
    kind,
    'failing' if ends[2] < _DEAD_CONTENT else 'warning',
    f'clips differ by {ends[1]:.3f} at a given place, of {ends[0][1]:.2f} at '
    f'step {ends[0][0]}, places by {position:.3f}: the targets no longer tell '
    'clips apart, whatever the loss does',
    f"a higher ema.value{chases}, objective.vjepa.target_norm='position', a "
    'lower learning rate, or a variance term',
  )


def _find_rank_loss(metrics: Metrics) -> Finding | None:
  """Targets that use ever fewer directions, while their deviation is fine."""
  ends = _ends(metrics, 'effective_rank')
  if ends is None:
    return None
  (step, first), now, largest = ends
  if largest >= _LOST_RANK * first:
    return None
  return Finding(
    'rank loss',
    'failing' if largest < 0.5 * _LOST_RANK * first else 'warning',
    f'the targets use {now:.1f} directions, {first:.1f} at step {step}: only '
    'what is easiest to predict is left',
    'a lower learning rate, masks whose content can be seen elsewhere (random '
    'tubelets, future), encoder.init_std near 1 / sqrt(width), or a variance '
    'and covariance term',
  )


def _find_stall(metrics: Metrics) -> Finding | None:
  """Neither loss nor targets have moved since the start."""
  losses = _column(metrics, 'loss')
  ranks = _ends(metrics, 'effective_rank')
  if ranks is None or len(losses) < 4 * _MIN_DIAGNOSES:
    return None
  (_, first_rank), rank, _ = ranks
  first = _mean(losses[:_MIN_DIAGNOSES])
  last = _mean(losses[-_MIN_DIAGNOSES:])
  still = abs(last / first - 1) < _STILL_LOSS
  if not still or abs(rank / first_rank - 1) > _STILL_RANK:
    return None
  rate = _column(metrics, 'learning_rate')
  at = f', the learning rate is {rate[-1][1]:.2g}' if rate else ''
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
  attentive = _column(metrics, 'probe_attentive')
  names = ('probe_attentive',) if attentive else ('probe_knn', 'probe_linear')
  for name in names:
    points = _column(metrics, name)
    if len(points) < 3:
      return None
    if any(v > points[0][1] - _PROBE_DROP for _, v in points[-2:]):
      return None
  (_, first), (step, last) = points[0], points[-1]
  kind = 'attentive' if attentive else 'linear'
  return Finding(
    'probes below their start',
    'warning',
    f'{kind} accuracy is {last:.3f} at step {step}, {first:.3f} before the '
    'first',
    'treat as rank loss'
    if attentive
    else 'the attentive probe (config.probe.attentive_labels), which sees what '
    'means over tokens hide; if it falls too, treat as rank loss',
  )


def _find_starvation(metrics: Metrics) -> Finding | None:
  """Devices that wait for data."""
  lines = [m for m in metrics if 'data_wait_seconds' in m][
    -2 * _MIN_DIAGNOSES :
  ]
  if len(lines) < _MIN_DIAGNOSES:
    return None
  # The first line of a run has its compilation in it.
  shares = sorted(
    min(m['data_wait_seconds'] / max(m['seconds_per_step'], 1e-9), 1.0)
    for m in lines
  )
  share = shares[len(shares) // 2]
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
  lines = [m for m in metrics if 'replaced_videos' in m]
  if not lines or not lines[-1]['replaced_videos']:
    return None
  last = lines[-1]
  clips = last['step'] * last['clips_per_second'] * last['seconds_per_step']
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


def _describe_learning(metrics: Metrics, diagnosed: Metrics) -> Finding:
  """Says what the loss means in a run without a finding."""
  losses = _column(metrics, 'loss')
  size = max(1, len(losses) // 10)
  low = min(
    _mean(losses[i : i + size]) for i in range(0, len(losses) - size + 1, size)
  )
  last = _mean(losses[-size:])
  first, now = diagnosed[0], diagnosed[-1]
  evidence = (
    f'clips differ by {now["content_std"]:.2f} at a given place '
    f'({first["content_std"]:.2f} at step {first["step"]}), the targets use '
    f'{now["effective_rank"]:.1f} directions ({first["effective_rank"]:.1f})'
  )
  if last > 1.05 * low:
    evidence += (
      f'. The loss rose from {low:.3g} to {last:.3g}, which is no harm: richer '
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
)
