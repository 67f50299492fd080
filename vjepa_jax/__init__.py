"""Self-supervised pretraining of video encoders by V-JEPA, in JAX."""

from typing import Any


def __getattr__(name: str) -> Any:
  # On first use: importing the package stays light.
  if name == 'load':
    from vjepa_jax.interop.load import load

    return load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
