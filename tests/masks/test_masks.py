"""Masks: invariants, and the statistics of the published generator."""

import dataclasses

import numpy as np
import pytest

from vjepa_jax.masks import fixed_size
from vjepa_jax.masks.multiblock import MultiBlock

GRID = (8, 14, 14)
NUM_TOKENS = 8 * 14 * 14
SHORT = dict(num_blocks=8, spatial_scale=(0.15, 0.15))
LONG = dict(num_blocks=2, spatial_scale=(0.7, 0.7))


def _count(context, target, **options):
  return dict(context_tokens=context, target_tokens=target, **options)


def _blocks(context, target, shape=SHORT, **options):
  return 'multiblock', _count(context, target, **shape, **options)


SPECS = {
  'short': _blocks(360, 752),
  'long': _blocks(104, 1104, LONG),
  'partial_time': _blocks(600, 300, temporal_scale=(0.3, 0.6)),
  'truncated_context': _blocks(150, 900, max_context_time=0.5),
  'inverse': _blocks(700, 400, invert=True),
  'full_complement': _blocks(360, NUM_TOKENS - 360, complement='target'),
  'predictor_complement': _blocks(NUM_TOKENS - 752, 752, complement='context'),
  'tube': ('tube', _count(152, 1416, ratio=0.9)),
  'random': ('random', _count(400, 1000, ratio=0.7)),
  'future': ('future', _count(392, 784, context_ratio=(0.25, 0.5))),
  'past': ('past', _count(784, 392, context_ratio=(0.5, 0.75))),
  'either': ('either', _count(700, 784)),
  'both': ('both', _count(784, 700)),
}


def _build(name, **changes):
  kind, options = SPECS[name]
  return fixed_size.build_mask_sampler(GRID, kind, {**options, **changes})


@pytest.mark.parametrize('subset', fixed_size.SUBSETS)
@pytest.mark.parametrize('name', SPECS)
def test_ids_are_sorted_in_range_disjoint_and_of_fixed_counts(name, subset):
  sampler = _build(name, subset=subset)
  counts = sampler.context_tokens, sampler.target_tokens
  for seed in range(40):
    context, target = sampler(np.random.default_rng(seed))
    for ids, count in zip((context, target), counts, strict=True):
      assert ids.dtype == np.int32 and ids.shape == (count,)
      assert (np.diff(ids) > 0).all()
      assert ids[0] >= 0 and ids[-1] < NUM_TOKENS
    assert not np.intersect1d(context, target).size


@pytest.mark.parametrize('name', SPECS)
def test_masks_are_a_pure_function_of_the_generator(name):
  sampler = _build(name)
  first, again, other = (
    np.concatenate(sampler(np.random.default_rng((3, position))))
    for position in (17, 17, 18)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


@pytest.mark.parametrize('name', ['full_complement', 'predictor_complement'])
def test_complements_use_every_token(name):
  context, target = _build(name)(np.random.default_rng(0))
  assert len(np.union1d(context, target)) == NUM_TOKENS


def _times(ids):
  return ids // (GRID[1] * GRID[2])


def test_temporal_masks_are_strictly_before_or_after():
  coins = set()
  samplers = {n: _build(n) for n in ('future', 'past', 'either', 'both')}

  def draw(name, seed):
    return map(_times, samplers[name](np.random.default_rng(seed)))

  for seed in range(40):
    context, target = draw('future', seed)
    assert context.max() < target.min()
    context, target = draw('past', seed)
    assert context.min() > target.max()
    context, target = draw('either', seed)
    coins.add(context.max() < target.min())
    assert context.max() < target.min() or context.min() > target.max()
    context, target = draw('both', seed)
    assert target.min() < context.min() and context.max() < target.max()
    assert not np.isin(target, np.unique(context)).any()
  assert coins == {True, False}


def test_max_context_time_hides_the_rest_of_the_clip():
  for seed in range(20):
    context, _ = _build('truncated_context')(np.random.default_rng(seed))
    assert _times(context).max() < 4


@pytest.mark.parametrize(
  'grid,pattern,mean_visible',
  [
    # Simulated figures of the published generator before truncation.
    ((8, 14, 14), SHORT, 583.7),
    ((8, 14, 14), LONG, 294.4),
    ((8, 16, 16), SHORT, 777.8),
    ((8, 16, 16), LONG, 389.0),
    ((32, 16, 16), SHORT, 3111.2),
    ((32, 24, 24), LONG, 3548.7),
  ],
)
def test_statistics_of_the_published_masks(grid, pattern, mean_visible):
  rng = np.random.default_rng(0)
  pattern = MultiBlock(**pattern)
  visible = [(~pattern.draw(grid, rng)).sum() for _ in range(6000)]
  assert np.mean(visible) == pytest.approx(mean_visible, rel=0.02)
  assert np.percentile(visible, 50) % grid[0] == 0  # whole tubes


@pytest.mark.parametrize('kind,shape', [('tube', (14, 14)), ('random', GRID)])
def test_random_masks_hide_every_place_equally_often(kind, shape):
  pattern = fixed_size.PATTERNS[kind](ratio=0.7)
  rng = np.random.default_rng(0)
  hidden = np.stack([pattern.draw(GRID, rng) for _ in range(400)])
  if kind == 'tube':
    assert (hidden == hidden[:, :1]).all()
    hidden = hidden[:, 0]
  assert hidden.shape[1:] == shape
  assert hidden.mean() == pytest.approx(0.7, abs=0.01)
  # A binomial over 400 draws deviates by .023, five times that is not chance.
  assert np.abs(hidden.mean(axis=0) - 0.7).max() < 0.12
  # Nor do places go together.
  pairs = (hidden[:, ..., 1:] == hidden[:, ..., :-1]).mean()
  assert pairs == pytest.approx(0.7**2 + 0.3**2, abs=0.02)


def test_published_counts_are_accepted_as_simulated():
  assert _build('short').check(4000) == pytest.approx(0.946, abs=0.02)
  assert _build('long').check(4000) == pytest.approx(0.924, abs=0.02)


def test_random_subset_has_no_bias_in_time_and_first_has():
  def mean_time(subset):
    sampler = _build('short', subset=subset)
    draws = [sampler(np.random.default_rng(s))[0] for s in range(300)]
    return np.mean([_times(ids).mean() for ids in draws])

  assert mean_time('random') == pytest.approx(3.5, abs=0.05)
  assert mean_time('first') < 3.0


@pytest.mark.parametrize(
  'kind,options,message',
  [
    ('blocks', {}, "mask kind 'blocks' is not one of"),
    ('future', _count(1, 1, blocks=3), r"has no option \['blocks'\]"),
    ('tube', dict(context_tokens=9), r"needs \['target_tokens'\]"),
    ('tube', _count(0, 9), 'at least one context'),
    (
      *_blocks(1200, 752),
      r'only 0% of the draws; at most \d+ and \d+ would do',
    ),
    ('tube', _count(100, 752, complement='target'), 'must add up to 1568'),
    ('tube', _count(100, 752, subset='last'), "subset 'last' is not one of"),
    ('future', _count(1, 1, context_ratio=(0.5, 1.0)), 'between 0 and 1'),
  ],
)
def test_errors_are_early_and_say_what_to_do(kind, options, message):
  with pytest.raises(ValueError, match=message):
    fixed_size.build_mask_sampler(GRID, kind, options)


def test_temporal_mask_needs_enough_time_steps():
  with pytest.raises(ValueError, match="'both' mask needs 3 time steps"):
    fixed_size.build_mask_sampler((2, 4, 4), 'both', _count(1, 1))


@dataclasses.dataclass(frozen=True)
class _Stripes:
  """Hides every `period`-th column, and the one at a random place first."""

  period: int = 2

  def draw(self, grid, rng):
    columns = (np.arange(grid[2]) + rng.integers(self.period)) % self.period
    return np.broadcast_to(columns == 0, grid)


def test_a_mask_kind_is_one_file_and_one_line(monkeypatch):
  monkeypatch.setitem(fixed_size.PATTERNS, 'stripes', _Stripes)
  options = _count(1000, 200, period=7)
  sampler = fixed_size.build_mask_sampler(GRID, 'stripes', options)
  context, target = sampler(np.random.default_rng(0))
  assert len(context) == 1000 and len(target) == 200
  assert len(np.unique(target % 7)) == 1  # one column of 7 is hidden
  assert not (context % 7 == target[0] % 7).any()
  with pytest.raises(ValueError, match=r"has no option \['ratio'\]"):
    fixed_size.build_mask_sampler(GRID, 'stripes', {**options, 'ratio': 0.5})
