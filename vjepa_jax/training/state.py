"""Everything that a training step carries."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.positions import Grid
from vjepa_jax.models.predictor import Predictor


class TrainState(struct.PyTreeNode):
  """Parameters, their moving average and the optimizer's moments.

  Random numbers are a function of seed and step, so no key is carried.

  Attributes:
    step: int32 scalar, number of steps done.
    params: {'encoder', 'predictor'}, learned by gradient; with labels
      {'encoder', 'probe'}.
    target: The EMA of params['encoder'], float32: in bfloat16 an average with
      momentum .99925 would not move at all. None in training with labels.
    opt_state: State of the optimizer.
    teacher: A frozen encoder whose features are predicted in place of the
      target's; None in most recipes. It is sharded and donated as the rest, and
      passes through a step as it is, without a copy; checkpoints leave it out,
      since its own run has it.
  """

  step: jax.Array
  params: Any
  target: Any
  opt_state: Any
  teacher: Any = None


def init_state(
  key: jax.Array,
  encoder: Encoder,
  predictor: Predictor,
  tx: optax.GradientTransformation,
  grid: Grid,
) -> TrainState:
  """Initialises a state; to be jitted with the shardings of the result.

  Args:
    key: Random key.
    encoder: Context and target encoder.
    predictor: Predictor.
    tx: Optimizer.
    grid: Tubelet grid of the clips. Parameters do not depend on it.

  Returns:
    The state at step 0, its target equal to the context encoder.
  """
  encoder_key, predictor_key = jax.random.split(key)
  sides = (n * size for n, size in zip(grid, encoder.tubelet, strict=True))
  video = jnp.zeros((1, *sides, 3), jnp.uint8)
  ids = jnp.zeros((1, 1), jnp.int32)
  features = jnp.zeros((1, 1, encoder.width), encoder.dtype)
  params = {
    'encoder': encoder.init(encoder_key, video, ids)['params'],
    'predictor': predictor.init(predictor_key, features, ids, ids, grid)[
      'params'
    ],
  }
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    target=jax.tree.map(jnp.copy, params['encoder']),
    opt_state=tx.init(params),
  )


def update_target(target: Any, params: Any, momentum: jax.Array) -> Any:
  """Moves the target: `momentum * target + (1 - momentum) * params`."""
  return jax.tree.map(
    lambda t, p: momentum * t + (1.0 - momentum) * p, target, params
  )
