"""Runs commands in this process."""

from types import ModuleType

from vjepa_jax.tools import command


def run_command(module: ModuleType, *arguments: str) -> int | None:
  """Runs a module of `vjepa_jax.tools` as its command line would."""
  options, words = command.parse(module.main, module.define_flags, arguments)
  return module.main(options, *words)
