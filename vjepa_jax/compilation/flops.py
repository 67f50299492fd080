"""Counts the matmuls of a program."""

import math
from typing import Any

from jax.interpreters import partial_eval

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
  return _count(needed)


def _count(jaxpr) -> tuple[float, float]:
  outside = inside = 0.0
  for equation in jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
      outside += _count_dot(equation)
      continue
    if name in _CUDNN_PRODUCTS:
      q, k = (v.aval.shape for v in equation.invars[:2])  # [B, N, heads, d]
      inside += _FLOPS * _CUDNN_PRODUCTS[name] * math.prod(q) * k[1]
      continue
    if name == 'cond':
      counts = [_count(branch.jaxpr) for branch in parameters['branches']]
      dots, kernels = max(counts, key=sum)
    else:
      bodies = _find_jaxprs(parameters)
      dots = sum(_count(body)[0] for body in bodies)
      kernels = sum(_count(body)[1] for body in bodies)
    if name == 'pallas_call':
      grid = math.prod(parameters['grid_mapping'].grid)
      dots, kernels = 0.0, grid * (dots + kernels)
    elif name == 'scan':
      dots, kernels = (parameters['length'] * n for n in (dots, kernels))
    elif name == 'shard_map':
      size = math.prod(parameters['mesh'].shape.values())
      dots, kernels = size * dots, size * kernels
    outside, inside = outside + dots, inside + kernels
  return outside, inside


def _find_jaxprs(parameters):
  """Finds the programs that an equation runs once each."""
  found = []
  for value in parameters.values():
    values = value if isinstance(value, (tuple, list)) else [value]
    for candidate in values:
      candidate = getattr(candidate, 'jaxpr', candidate)
      if hasattr(candidate, 'eqns'):
        found.append(candidate)
  return found


def _count_dot(equation) -> float:
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  out = equation.outvars[0].aval.shape
  return float(_FLOPS * math.prod(out) * math.prod(left[i] for i in contracted))
