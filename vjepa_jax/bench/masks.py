"""`bench masks`: mask sampling against the decoding of the clip it is for."""

import argparse
from pathlib import Path
import time
from typing import Any

import numpy as np

from vjepa_jax.bench import measure
from vjepa_jax.bench.data import draw_clips
from vjepa_jax.bench.decoders import read_ours
from vjepa_jax.bench.videos import (
  ENCODINGS,
  TOY_ENCODINGS,
  encode_cases,
  find_videos,
)
from vjepa_jax.masks.fixed_size import MaskSampler, build_mask_sampler
from vjepa_jax.tasks.program import get_grid

_AIM = 0.02
# Masks that are drawn in one timed run: one alone is shorter than a clock's
# noise.
_DRAWS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this sub-command."""
  parser.add_argument(
    '--videos', metavar='GLOB', help='your files; else encoded from footage'
  )
  parser.add_argument(
    '--folder', default='data/bench', help='where files are encoded to'
  )


def build_samplers(quick: bool) -> dict[str, tuple[MaskSampler, Any]]:
  """Builds the samplers of the published recipes, and one of each other kind.

  Returns:
    By recipe and mask name: the sampler, and the clip's section of the config.
  """
  from configs import vjepa1, vjepa2  # noqa: PLC0415 - not in the package

  recipes = {'vjepa1:l16': vjepa1.get_config('l16')}
  if not quick:
    recipes['vjepa1:h16_384'] = vjepa1.get_config('h16_384')
    recipes['vjepa2:g16'] = vjepa2.get_config('g16')
    for stage in ('cooldown_256', 'cooldown_384'):
      recipes[f'vjepa2:{stage}'] = vjepa2.get_config(f'stage={stage}')
  samplers = {}
  for recipe, config in recipes.items():
    for name in config.mask_names:
      options = config.masks[name].to_dict()
      samplers[f'{recipe} {name}'] = (
        build_mask_sampler(get_grid(config), options.pop('kind'), options),
        config.clip,
      )
  config = recipes['vjepa1:l16']
  counts = {'context_tokens': 128, 'target_tokens': 512}
  for kind in ('tube', 'future', 'past', 'either', 'both'):
    samplers[f'vjepa1:l16 {kind}'] = (
      build_mask_sampler(get_grid(config), kind, counts),
      config.clip,
    )
  return samplers


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Times masks and the decoding of one clip in turn."""
  quick = arguments.quick
  try:
    samplers = build_samplers(quick)
  except ImportError as error:
    raise measure.BenchError(
      'the recipes in configs/ are needed: run in the root of the repository'
    ) from error
  if arguments.videos:
    paths = find_videos(arguments.videos)
  else:
    # The cheapest to decode, so that the share is the largest.
    encodings = (TOY_ENCODINGS if quick else ENCODINGS)[:1]
    frames = 72 if quick else 300
    (paths,) = encode_cases(
      Path(arguments.folder), encodings, frames=frames, toy=quick
    ).values()
  rounds = arguments.rounds or (2 if quick else 20)
  clips = draw_clips(
    (paths * rounds)[:rounds], frames=16, step=4, resolution=224
  )

  def draw(i, sampler):
    for k in range(_DRAWS):
      sampler(np.random.default_rng((i, k)))

  runs = {'decode': lambda i: read_ours(clips[i])}
  for name, (sampler, _) in samplers.items():
    runs[name] = lambda i, sampler=sampler: draw(i, sampler)
  times = measure.alternate(
    runs, rounds, clock=time.process_time, label='masks'
  )
  decode = times.pop('decode')
  cases = {}
  for name, (_, clip) in samplers.items():
    # A clip of 64 frames at 256 px costs more to decode than the one that is
    # timed: only frames of the same size count, so the share is an upper bound.
    seconds = [t / _DRAWS for t in times[name]]
    scale = clip.frames / 16
    scaled = [scale * t for t in decode]
    cases[name] = measure.compare({measure.OURS: seconds, 'decode': scaled})
  print('masks of one clip, and their share of the time to decode it')
  measure.print_table(
    ['', 'masks/s', 'us a mask', 'of decoding'],
    [
      [
        name,
        f'{1 / case["ours"]["median"]:.0f}',
        f'{1e6 * case["ours"]["median"]:.0f}',
        f'{case["ratio"]["decode"]:.2%}',
      ]
      for name, case in cases.items()
    ],
  )
  # A clip needs one of each mask of its recipe.
  shares = {}
  for name, case in cases.items():
    recipe, mask = name.split()
    if mask in ('short', 'long'):
      shares[recipe] = shares.get(recipe, 0.0) + case['ratio']['decode']
  worst = max(shares, key=shares.get)
  print(
    f'all masks of a clip: at most {shares[worst]:.2%} of its decoding '
    f'({worst}; aim: {_AIM:.0%} or less)'
  )
  return {
    'unit': 'CPU s',
    'ratio': {'decode': shares[worst]},
    'ours': {name: case['ours'] for name, case in cases.items()},
    'peer': {'decode': measure.summarize(decode)},
    'cases': cases,
    'shares': shares,
  }
