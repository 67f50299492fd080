"""Counts the matmuls of a program."""

import math
from typing import Any

import jax
from jax.interpreters import partial_eval
import numpy as np

# Multiply and add.
_FLOPS = 2
# Products of queries with keys, or of their size, in each cuDNN kernel.
_CUDNN_PRODUCTS = {
  'dot_product_attention_fwd_wrapper': 2,
  'dot_product_attention_bwd_wrapper': 5,
}


def count_flops(jaxpr: Any) -> tuple[float, float]:
  """Counts the FLOPs of all matmuls that a traced program holds.

  Loops count as often as they run and kernels as often as their grid has
  programs, zero lanes included: what the hardware multiplies.

  Args:
    jaxpr: Of `jax.jit(f).trace(...).jaxpr`, open or closed.

  Returns:
    FLOPs of all devices: outside of kernels (Pallas, cuDNN), and in them.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  # Gradients that nobody asks for, of pixels, are traced but never compiled.
  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  outside, inside = _count(needed)
  return float(outside), float(inside)


def _count(jaxpr) -> np.ndarray:
  """Counts outside of kernels and in them, float64 [2]."""
  total = np.zeros(2)
  for equation in jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = parameters['dimension_numbers']
      left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
      size = math.prod(out) * math.prod(left[i] for i in contracted)
      total[0] += _FLOPS * size
      continue
    if name in _CUDNN_PRODUCTS:
      q, k = (v.aval.shape for v in equation.invars[:2])  # [B, N, heads, d]
      total[1] += _FLOPS * _CUDNN_PRODUCTS[name] * math.prod(q) * k[1]
      continue
    values = (getattr(x, 'jaxpr', x) for x in jax.tree.leaves(parameters))
    counts = [_count(body) for body in values if hasattr(body, 'eqns')]
    if name == 'cond':
      count = max(counts, key=np.sum)
    else:
      count = sum(counts, np.zeros(2))
    if name == 'pallas_call':
      grid = math.prod(parameters['grid_mapping'].grid)
      count = np.array([0.0, grid * count.sum()])
    elif name == 'scan':
      count *= parameters['length']
    elif name == 'shard_map':
      count *= math.prod(parameters['mesh'].shape.values())
    total += count
  return total
