"""The fixed-size rule: every sample of a mask spec has the same token counts.

The published code cuts all samples of a batch to the smallest of them, by
keeping the first tokens in raster order. The counts then differ every batch
(853 distinct pairs of shapes in 2000 batches at 16 x 224 px, 8 blocks of .15),
which a compiled step cannot follow; they depend on the batch size; and what is
cut is always the end of the clip: the context covers on average only the first
.66 (8 blocks) or .40 (2 blocks) of the time axis at 24 clips a device. Fixed
counts near the published means ((360, 752) and (104, 1104) of 1568 tokens) cost
0.997 of the published FLOPs, in one program, and accept 95 % and 92 % of the
draws; a random subset has no bias in time.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
from typing import Any, Protocol

import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.masks import Grid
from vjepa_jax.masks.multiblock import MultiBlock
from vjepa_jax.masks.temporal import DIRECTIONS, Temporal
from vjepa_jax.masks.tube import RandomTube, RandomTubelets

SUBSETS = ('random', 'first')
COMPLEMENTS = ('none', 'target', 'context')

_MAX_DRAWS = 1000
_MIN_ACCEPTANCE = 0.2


class Pattern(Protocol):
  """What a mask kind hides; its parameters are options of a config."""

  def draw(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """Draws the hidden tokens of one clip: bool `[T, H, W]`."""


PATTERNS: dict[str, Callable[..., Pattern]] = {
  'multiblock': MultiBlock,
  'tube': RandomTube,
  'random': RandomTubelets,
  **{name: functools.partial(Temporal, name) for name in DIRECTIONS},
}


@dataclasses.dataclass(frozen=True)
class MaskSampler:
  """Draws context and target token ids of fixed counts for one clip."""

  pattern: Pattern
  grid: Grid
  context_tokens: int  # Kc
  target_tokens: int  # Kt
  # Which tokens are kept of those that a draw offers: a uniformly 'random'
  # subset, or the 'first' in raster order, as published.
  subset: str = 'random'
  # 'target': the targets are all that is not context ("full complement").
  # 'context': the context is all that is not target ("predictor complement").
  # 'none': neither, some tokens are unused.
  complement: str = 'none'

  def __post_init__(self):
    for name, choices in (('subset', SUBSETS), ('complement', COMPLEMENTS)):
      if getattr(self, name) not in choices:
        raise UserError(
          f'{name} {getattr(self, name)!r} is not one of {choices}'
        )
    if min(self.context_tokens, self.target_tokens) < 1:
      raise UserError(
        f'a mask needs at least one context and one target token, got '
        f'{self.context_tokens} and {self.target_tokens}'
      )
    num_tokens = int(np.prod(self.grid))
    used = self.context_tokens + self.target_tokens
    if self.complement != 'none' and used != num_tokens:
      raise UserError(
        f'complement={self.complement!r} uses every token, so context and '
        f'target tokens must add up to {num_tokens}, not '
        f'{self.context_tokens} + {self.target_tokens}'
      )

  def __call__(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws until the counts can be met, then keeps a subset.

    Args:
      rng: The only source of randomness: one generator a sample makes the
        masks independent of hosts and workers.

    Returns:
      Context ids int32 `[Kc]` and target ids int32 `[Kt]`: sorted, disjoint,
      raster order over (t, h, w).

    Raises:
      RuntimeError: No draw out of 1000 met the counts.
    """
    for _ in range(_MAX_DRAWS):
      hidden = self.pattern.draw(self.grid, rng).reshape(-1)
      visible_ids, hidden_ids = np.flatnonzero(~hidden), np.flatnonzero(hidden)
      if self._accepts(len(visible_ids), len(hidden_ids)):
        context, target = self._keep(visible_ids, hidden_ids, rng)
        return context.astype(np.int32), target.astype(np.int32)
    raise RuntimeError(
      f'{self.pattern} met {self.context_tokens} context and '
      f'{self.target_tokens} target tokens in none of {_MAX_DRAWS} draws'
    )

  def _accepts(self, num_visible: int, num_hidden: int) -> bool:
    # The complement takes its tokens from both sides.
    return (
      self.complement == 'context' or num_visible >= self.context_tokens
    ) and (self.complement == 'target' or num_hidden >= self.target_tokens)

  def _keep(self, visible, hidden, rng):
    tokens = np.arange(np.prod(self.grid))
    if self.complement == 'context':
      target = self._subset(hidden, self.target_tokens, rng)
      return np.setdiff1d(tokens, target, assume_unique=True), target
    context = self._subset(visible, self.context_tokens, rng)
    if self.complement == 'target':
      return context, np.setdiff1d(tokens, context, assume_unique=True)
    return context, self._subset(hidden, self.target_tokens, rng)

  def _subset(self, ids, count, rng):
    if self.subset == 'first':
      return ids[:count]
    return np.sort(rng.choice(ids, count, replace=False))

  def check(self, num_draws: int = 500) -> float:
    """Measures the acceptance rate, so that a hopeless spec fails at start.

    Returns:
      The share of draws that meet the counts.

    Raises:
      UserError: It is under a fifth; the message names counts that would do.
    """
    rng = np.random.default_rng(0)
    num_hidden = np.array(
      [self.pattern.draw(self.grid, rng).sum() for _ in range(num_draws)]
    )
    num_visible = int(np.prod(self.grid)) - num_hidden
    acceptance = np.mean(list(map(self._accepts, num_visible, num_hidden)))
    if acceptance < _MIN_ACCEPTANCE:
      context, target = (
        int(np.percentile(counts, 5)) for counts in (num_visible, num_hidden)
      )
      raise UserError(
        f'on a grid of {self.grid} tubelets {self.pattern} offers '
        f'{self.context_tokens} context and {self.target_tokens} target '
        f'tokens in only {acceptance:.0%} of the draws; at most '
        f'{max(context, 1)} and {max(target, 1)} would do in 90 %'
      )
    return float(acceptance)


def build_mask_sampler(
  grid: Grid, kind: str, options: Mapping[str, Any]
) -> MaskSampler:
  """Builds the sampler of one mask spec of a config.

  Args:
    grid: Tubelet grid (T, H, W).
    kind: One of `PATTERNS`.
    options: Fields of `MaskSampler` (context_tokens, target_tokens, subset,
      complement) and of the kind's pattern.

  Raises:
    UserError: Unknown kind or option, or counts that cannot be met.
  """
  if kind not in PATTERNS:
    raise UserError(f'mask kind {kind!r} is not one of {tuple(PATTERNS)}')
  make_pattern = PATTERNS[kind]
  accepted = set(inspect.signature(make_pattern).parameters)
  rule = set(inspect.signature(MaskSampler).parameters) - {'pattern', 'grid'}
  if unknown := set(options) - rule - accepted:
    raise UserError(
      f'mask kind {kind!r} has no option {sorted(unknown)}, it has '
      f'{sorted(rule | accepted)}'
    )
  if missing := {'context_tokens', 'target_tokens'} - set(options):
    raise UserError(f'mask kind {kind!r} needs {sorted(missing)}')
  pattern = make_pattern(**{k: v for k, v in options.items() if k in accepted})
  counts = {k: v for k, v in options.items() if k in rule}
  sampler = MaskSampler(pattern, grid, **counts)
  sampler.check()
  return sampler
