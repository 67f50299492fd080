"""`bench masks`: mask sampling against the decoding of the clip it is for."""

import argparse
from functools import partial
import time
from typing import Any

from ml_collections import config_dict
import numpy as np

from configs import vjepa1, vjepa2
from vjepa_jax.bench import measure
from vjepa_jax.bench.data import draw_clips, read_ours
from vjepa_jax.bench.videos import OPTIONS, find_cases  # noqa: F401
from vjepa_jax.data import storage
from vjepa_jax.masks.fixed_size import MaskSampler, build_mask_sampler
from vjepa_jax.tasks.pretrain import make_loader
from vjepa_jax.tasks.program import get_grid

_AIM = 0.02
# Masks that are drawn in one timed run: one alone is shorter than a clock's
# noise.
_DRAWS = 20


def build_samplers(config: config_dict.ConfigDict) -> dict[str, MaskSampler]:
  """Builds the mask samplers of a recipe, by name."""
  config.data.sources = {}
  return dict(
    zip(config.mask_names, make_loader(config).mask_samplers, strict=True)
  )


def collect_samplers(quick: bool) -> dict[str, tuple[MaskSampler, int]]:
  """Builds the samplers of the published recipes, and one of each other kind.

  Returns:
    By recipe and mask name: the sampler, and the frames of the recipe's clips.
  """
  recipes = {'vjepa1:l16': vjepa1.get_config('l16')}
  if not quick:
    recipes['vjepa1:h16_384'] = vjepa1.get_config('h16_384')
    recipes['vjepa2:g16'] = vjepa2.get_config('g16')
    for stage in ('cooldown_256', 'cooldown_384'):
      recipes[f'vjepa2:{stage}'] = vjepa2.get_config(f'stage={stage}')
  samplers = {
    f'{recipe} {name}': (sampler, config.clip.frames)
    for recipe, config in recipes.items()
    for name, sampler in build_samplers(config).items()
  }
  config = recipes['vjepa1:l16']
  counts = {'context_tokens': 128, 'target_tokens': 512}
  for kind in ('tube', 'future', 'past', 'either', 'both'):
    sampler = build_mask_sampler(get_grid(config), kind, counts)
    samplers[f'vjepa1:l16 {kind}'] = sampler, config.clip.frames
  return samplers


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Times masks and the decoding of one clip in turn."""
  samplers = collect_samplers(arguments.quick)
  # The cheapest to decode, so that the share is the largest.
  (pattern,) = find_cases(arguments, 1).values()
  rounds = arguments.rounds or (2 if arguments.quick else 20)
  clips = draw_clips(sorted(storage.match(pattern)), rounds)

  def draw(sampler, i):
    for k in range(_DRAWS):
      sampler(np.random.default_rng((i, k)))

  runs = {
    name: partial(draw, sampler) for name, (sampler, _) in samplers.items()
  }
  runs = {'decode': lambda i: read_ours(clips[i]), **runs}
  times = measure.alternate(
    runs, rounds, clock=time.process_time, label='masks'
  )
  decode = times.pop('decode')
  cases, shares = {}, {}
  for name, (_, frames) in samplers.items():
    # A clip of 64 frames at 256 px costs more to decode than the one that is
    # timed: only frames of the same size count, so the share is an upper bound.
    seconds = [t / _DRAWS for t in times[name]]
    scaled = [frames / 16 * t for t in decode]
    case = measure.compare({measure.OURS: seconds, 'decode': scaled})
    cases[name] = case
    # A clip needs one of each mask of its recipe.
    recipe, mask = name.split()
    if mask in ('short', 'long'):
      shares[recipe] = shares.get(recipe, 0.0) + case['ratio']['decode']
  measure.print_cases(cases, 'masks or clips a second', lambda t: 1 / t)
  worst = max(shares, key=shares.get)
  print(
    f'all masks of a clip: at most {shares[worst]:.2%} of its decoding '
    f'({worst}; aim: {_AIM:.0%} or less)'
  )
  return {
    'unit': 'CPU s',
    **measure.join(cases),
    'ratio': {'decode': shares[worst]},
    'peer': {'decode': measure.summarize(decode)},
    'shares': shares,
  }
