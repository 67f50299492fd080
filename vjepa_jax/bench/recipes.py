"""Recipes, from which benchmarks take sizes and masks."""

import importlib
from typing import Any

from ml_collections import config_dict

from vjepa_jax.bench.measure import BenchError
from vjepa_jax.masks.fixed_size import MaskSampler, build_mask_sampler
from vjepa_jax.tasks.program import get_grid


def import_recipe(name: str) -> Any:
  """Imports a file of `configs/`, which is beside the package.

  Raises:
    BenchError: There is none.
  """
  try:
    importlib.import_module('configs')
    return importlib.import_module(f'configs.{name}')
  except ImportError as error:
    raise BenchError(
      'the recipes in configs/ are needed: run in the root of the repository'
    ) from error


def build_samplers(config: config_dict.ConfigDict) -> dict[str, MaskSampler]:
  """Builds the mask samplers of a recipe, by name."""
  samplers = {}
  for name in config.mask_names:
    options = config.masks[name].to_dict()
    kind = options.pop('kind')
    samplers[name] = build_mask_sampler(get_grid(config), kind, options)
  return samplers
