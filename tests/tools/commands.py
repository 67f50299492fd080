"""Imports commands into one process, though their flags have the same names."""

import importlib
from types import ModuleType

from absl import flags


def import_command(name: str) -> ModuleType:
  """Imports `vjepa_jax.tools.NAME`; its flags replace others of their names."""
  others = [
    (owner, flag)
    for owner, found in flags.FLAGS.flags_by_module_dict().items()
    if owner.startswith('vjepa_jax.tools.')
    for flag in found
  ]
  for flag_name in {flag.name for _, flag in others}:
    delattr(flags.FLAGS, flag_name)
  module = importlib.import_module(f'vjepa_jax.tools.{name}')
  for owner, flag in others:
    if flag.name not in flags.FLAGS:
      flags.FLAGS[flag.name] = flag
      flags.FLAGS.register_flag_by_module(owner, flag)
  return module
