"""Imports commands into one process, though their flags have the same names."""

import importlib
from types import ModuleType

from absl import flags


def import_command(name: str) -> ModuleType:
  """Imports `vjepa_jax.tools.NAME`; its flags replace others of their names."""
  others = {
    flag.name
    for module, found in flags.FLAGS.flags_by_module_dict().items()
    if module.startswith('vjepa_jax.tools.')
    for flag in found
  }
  saved = {other: flags.FLAGS[other] for other in others}
  for other in others:
    delattr(flags.FLAGS, other)
  module = importlib.import_module(f'vjepa_jax.tools.{name}')
  for other, flag in saved.items():
    if other not in flags.FLAGS:
      flags.FLAGS[other] = flag
  return module
