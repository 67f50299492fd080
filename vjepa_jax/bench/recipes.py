"""Recipes, from which benchmarks take sizes and masks."""

from ml_collections import config_dict

from vjepa_jax.masks.fixed_size import MaskSampler, build_mask_sampler
from vjepa_jax.tasks.program import get_grid


def build_samplers(config: config_dict.ConfigDict) -> dict[str, MaskSampler]:
  """Builds the mask samplers of a recipe, by name."""
  samplers = {}
  for name in config.mask_names:
    options = config.masks[name].to_dict()
    kind = options.pop('kind')
    samplers[name] = build_mask_sampler(get_grid(config), kind, options)
  return samplers
