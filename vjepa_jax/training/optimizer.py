"""AdamW with the published exclusions, Muon, and clipping by module."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from vjepa_jax.models.options import check_choice


def make_optimizer(
  *,
  kind: str = 'adamw',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  layer_decay: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Makes the optimizer of any task.

  Its `update` takes 'learning_rate' and 'weight_decay', float32 scalars, the
  second multiplied by the first as in torch. They come from the step of the
  state, not from a count inside the optimizer, so that a later stage may take
  over the moments and start its own schedules.

  Args:
    kind: 'adamw', or 'muon' for the matrices of transformer blocks and AdamW
      for all else.
    b1, b2, eps: Of Adam.
    layer_decay: See `decay_by_layer`; None for none.

  Raises:
    UserError: Unknown kind.
  """
  adam = optax.scale_by_adam(b1, b2, eps)
  kinds = {'adamw': adam, 'muon': _scale_by_muon(adam)}
  check_choice('optimizer kind', kind, kinds)
  direction = kinds[kind]

  def update(grads, opt_state, params, *, learning_rate, weight_decay):
    updates, opt_state = direction.update(grads, opt_state, params)

    def scale(parameter, update, decays, factor=1.0):
      if decays:
        update = update + weight_decay * parameter
      rate = learning_rate if layer_decay is None else learning_rate * factor
      return -rate * update

    trees = [params, updates, mask_decayed(params)]
    if layer_decay is not None:
      trees.append(decay_by_layer(params, layer_decay))
    return jax.tree.map(scale, *trees), opt_state

  return optax.GradientTransformationExtraArgs(direction.init, update)


def _scale_by_muon(
  others: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Orthogonalises the momentum of the matrices of transformer blocks.

  Updates have the size of Adam's (arXiv 2502.16982), so that one learning rate
  serves both.
  """

  def resize(update, axes):
    sides = [math.prod(update.shape[a] for a in side) for side in axes]
    return 0.2 * max(sides) ** 0.5 * update

  def scale(updates, params=None):
    del params
    return jax.tree.map(resize, updates, find_matrices(updates))

  def label(params):
    return jax.tree.map(
      lambda _, axes: 'others' if axes is None else 'matrices',
      params,
      find_matrices(params),
    )

  muon = optax.contrib.scale_by_muon(weight_dimension_numbers=find_matrices)
  return optax.partition(
    {'matrices': optax.chain(muon, optax.stateless(scale)), 'others': others},
    label,
  )


def find_matrices(params: Any) -> Any:
  """Finds the matrices of transformer blocks: axes of inputs and of outputs.

  Blocks under 'blocks' are stacked by a scan, along an axis that is neither;
  the heads of attention are merged.

  Returns:
    The tree with `MuonDimensionNumbers`, or None where there is no matrix.
  """

  def find(path, leaf):
    names = [key.key for key in path if hasattr(key, 'key')]
    inside = any(name.startswith('block') for name in names)
    if not (inside and names[-1].endswith('kernel')):
      return None
    axes = tuple(range('blocks' in names, leaf.ndim))
    # [D, heads, d] but for what comes out of the heads, [heads, d, D].
    split = len(axes) - 1 if names[-1] == 'out_kernel' else 1
    return optax.contrib.MuonDimensionNumbers(axes[:split], axes[split:])

  return jax.tree_util.tree_map_with_path(find, params)


def mask_decayed(params: Any) -> Any:
  """Marks by a bool the leaves that decay: no biases, no norms.

  Mask tokens do, as published: they have three dimensions there and no 'bias'
  in their name.
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
    if names[0] != 'encoder' or names[1].startswith('norm'):
      return np.float32(1.0)
    blocks = params['encoder']['transformer']['blocks']
    depth = len(blocks['norm1']['scale'])
    if names[1].startswith(('embed', 'modality')):
      return np.float32(decay ** (depth + 1))
    powers = depth - np.arange(depth, dtype=np.float32)
    return np.float32(decay) ** powers.reshape(-1, *[1] * (leaf.ndim - 1))

  return jax.tree_util.tree_map_with_path(factor, params)


def clip_by_module(
  grads: dict[str, Any], max_norm: jax.Array | float
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """Clips the gradients of each module to a global norm of its own.

  Returns:
    The clipped gradients by module, and the norms before, float32 scalars.
  """
  norms = {name: optax.tree.norm(tree) for name, tree in grads.items()}

  def clip(tree, norm):
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, tree)

  return {name: clip(grads[name], norms[name]) for name in grads}, norms
