"""AdamW with the published exclusions, and clipping by module."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def mask_decayed(params: Any) -> Any:
  """Marks the leaves that weight decay applies to: no biases, no norms.

  Mask tokens do decay, as published: they have three dimensions there and no
  'bias' in their name.

  Returns:
    The tree with a bool for each leaf.
  """

  def decays(path, _):
    name = path[-1].key
    return not (name.endswith('bias') or name == 'scale')

  return jax.tree_util.tree_map_with_path(decays, params)


def decay_by_layer(params: dict[str, Any], decay: float) -> Any:
  """Computes what layer-wise decay multiplies the learning rate by.

  With `depth` blocks, the embedding of tubelets has `decay ** (depth + 1)`,
  block i (from 0) `decay ** (depth - i)`, the encoder's last norm and all
  other modules 1 (BEiT, arXiv 2106.08254, and VideoMAE after it).

  Args:
    params: 'encoder' and the modules on top of it.
    decay: Factor from one layer to the one before it.

  Returns:
    The tree with a float32 array for each leaf, that broadcasts against it;
    for the scanned blocks it varies along the leading axis.
  """

  def factor(path, leaf):
    names = [key.key for key in path]
    if names[0] != 'encoder' or 'norm' in names[1:2]:
      return np.float32(1.0)
    depth = params['encoder']['transformer']['blocks']['norm1']['scale'].shape[
      0
    ]
    if names[1] == 'embed':
      return np.float32(decay ** (depth + 1))
    powers = depth - np.arange(depth, dtype=np.float32)
    return np.float32(decay) ** powers.reshape(-1, *[1] * (leaf.ndim - 1))

  return jax.tree_util.tree_map_with_path(factor, params)


def apply_adamw(
  tx: optax.GradientTransformation,
  grads: Any,
  opt_state: Any,
  params: Any,
  learning_rate: jax.Array,
  weight_decay: jax.Array,
  factors: Any = None,
) -> tuple[Any, Any]:
  """Takes one AdamW step with this step's rate and decay.

  They come from the step of the state, not from a count inside the optimizer,
  so that a later stage may take over the moments and start its own schedules.

  Args:
    tx: `optax.scale_by_adam`.
    grads: Gradients.
    opt_state: Moments.
    params: Parameters.
    learning_rate: float32 scalar.
    weight_decay: float32 scalar; as in torch, multiplied by the rate.
    factors: What each leaf's rate is multiplied by, see `decay_by_layer`; None
      for 1.

  Returns:
    New parameters and moments.
  """
  updates, opt_state = tx.update(grads, opt_state)

  def step(parameter, update, decays, factor=1.0):
    if decays:
      update = update + weight_decay * parameter
    rate = learning_rate if factors is None else learning_rate * factor
    return parameter - rate * update

  trees = [params, updates, mask_decayed(params)]
  if factors is not None:
    trees.append(factors)
  return jax.tree.map(step, *trees), opt_state


def clip_by_module(
  grads: dict[str, Any], max_norm: jax.Array | float
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """Clips the gradients of each module to a global norm of its own.

  Args:
    grads: Gradients by module: 'encoder' and 'predictor'.
    max_norm: Largest norm; infinity for none.

  Returns:
    The clipped gradients, and each module's norm before, a float32 scalar.
  """
  norms = {name: optax.tree.norm(tree) for name, tree in grads.items()}

  def clip(tree, norm):
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, tree)

  return {name: clip(grads[name], norms[name]) for name in grads}, norms
