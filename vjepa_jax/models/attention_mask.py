"""Which tokens attend to which: static, so that kernels can plan."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Mask:
  """What the tokens of one sequence see of it: all others, by default."""

  # 'Block-causal' (V-JEPA 2-AC): tokens are in order of time, so many a step,
  # and see their own step and those before.
  tokens_per_step: int | None = None

  def __str__(self) -> str:
    if self.tokens_per_step is None:
      return 'full'
    return f'block_causal({self.tokens_per_step})'

  def find_last_keys(self, queries: Any) -> Any:
    """Returns the last token that each of block-causal `queries` `[N]` sees.

    With it in place of the query's own index the mask is the causal one.
    """
    count = self.tokens_per_step
    return queries // count * count + count - 1

  def make_dense(self, length: int) -> jnp.ndarray:
    """Returns whether block-causal queries see keys, bool `[N, N]`."""
    tokens = jnp.arange(length)
    return self.find_last_keys(tokens)[:, None] >= tokens


FULL = Mask()


def block_causal(tokens_per_step: int) -> Mask:
  """Returns the mask by which a step, full in itself, sees no later one."""
  return Mask(tokens_per_step)
