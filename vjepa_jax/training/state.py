"""Everything that a training step carries."""

import hashlib
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vjepa_jax.training.objectives.base import Objective


class TrainState(struct.PyTreeNode):
  """Parameters, their moving average and the optimizer's moments.

  Random numbers are a function of seed and step, so no key is carried.
  """

  step: jax.Array  # int32, steps done
  params: Any  # by module
  # The EMA of the module that the objective names, float32: in bfloat16 an
  # average with momentum .99925 would not move at all. None for none.
  target: Any
  opt_state: Any
  # Parameters of another run that the loss needs, as those of a teacher; None
  # in most recipes. They are sharded and donated as the rest, and pass through
  # a step as they are, without a copy; checkpoints leave them out, since their
  # own run has them.
  frozen: Any = None


def init_state(
  objective: Objective, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """Initialises a state at step 0, its target a copy, nothing frozen.

  To be jitted with the shardings of the result.
  """
  params = objective.init(key)
  target = None
  if objective.averaged is not None:
    target = jax.tree.map(jnp.copy, params[objective.averaged])
  return TrainState(jnp.zeros((), jnp.int32), params, target, tx.init(params))


def hash_params(params: Any) -> str:
  """Hashes parameters: a backbone that trains on under its name is another."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return digest.hexdigest()
