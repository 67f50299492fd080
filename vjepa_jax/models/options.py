"""The fields that models share, and the check of those that are names."""

from collections.abc import Collection
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from vjepa_jax.errors import UserError


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
  """Raises UserError, which lists the choices, unless `value` is one."""
  if value not in choices:
    raise UserError(f'{name} {value!r} is not one of {(*choices,)}')


class Options(nn.Module, kw_only=True):
  """How a transformer, and a model around one, is initialised and computed."""

  init_std: float = 0.02  # of kernels, see `linear.make_initializer`
  # Whether kernels that write to the residual stream start scaled by
  # `1 / sqrt(2 (layer + 1))`, as in V-JEPA 2; in V-JEPA 1 the rescale is
  # overwritten and has no effect.
  scale_init_by_depth: bool = False
  # What the backward pass recomputes. 'none': nothing. 'full': the whole block,
  # keeping its input only. 'attention': the same but for the output of the
  # attention kernel. 'dots': all but the matmuls without batch dimensions.
  remat: str = 'none'
  attention: str = 'xla'  # kernel, see `attention.attend`
  dtype: jnp.dtype = jnp.float32  # of computation; parameters are float32

  def get_options(self) -> dict[str, Any]:
    """Returns the fields of `Options`, for a model inside or beside."""
    names = 'init_std', 'scale_init_by_depth', 'remat', 'attention', 'dtype'
    return {name: getattr(self, name) for name in names}
