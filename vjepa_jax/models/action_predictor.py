"""The action-conditioned predictor: the features of the next frame.

V-JEPA 2-AC (arXiv 2506.09985, section 3.1).
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.errors import UserError
from vjepa_jax.models import transformer
from vjepa_jax.models.attention_mask import block_causal
from vjepa_jax.models.linear import Dense, make_initializer
from vjepa_jax.models.options import Options, check_choice
from vjepa_jax.models.positions import (
  Grid,
  compute_coordinates,
  encode_positions,
)

_POSITIONS = 'rope_tiled', 'rope_interleaved'


class ActionPredictor(Options):
  """Predicts frames from frames, actions and states, one step ahead.

  The tokens of a step are [action, state, extrinsics, patches]. They see each
  other and all steps before.
  """

  out_width: int  # features of a token, which go in and are predicted
  width: int = 1024
  depth: int = 24
  num_heads: int = 16
  action_dim: int = 7
  state_dim: int = 7
  extrinsics_dim: int = 0  # of the camera; 0 for a model without
  positions: str = 'rope_tiled'  # see `Encoder`; or 'rope_interleaved'

  def __post_init__(self):
    check_choice('positions', self.positions, _POSITIONS)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    features: jnp.ndarray,
    actions: jnp.ndarray,
    states: jnp.ndarray,
    grid: Grid,
    extrinsics: jnp.ndarray | None = None,
  ) -> jnp.ndarray:
    """Predicts, after each step, the features of the next frame.

    Args:
      features: Of T frames, each encoded alone and normalised,
        `[B, T * H * W, out_width]`, raster order over (t, h, w).
      actions: What is done at each step, `[B, T, action_dim]`.
      states: In which state, `[B, T, state_dim]`.
      grid: (T, H, W).
      extrinsics: Where the camera is, `[B, T, extrinsics_dim]`. None leaves the
        token out, in a model that has weights for it too.

    Returns:
      `[B, T * H * W, out_width]` in the compute dtype, of which step t is the
      prediction of frame t + 1; not normalised.

    Raises:
      UserError: There are extrinsics, and the model has no weights for them.
    """
    if extrinsics is not None and not self.extrinsics_dim:
      raise UserError('extrinsics need a predictor with extrinsics_dim')

    def project(x, features, name):
      init = make_initializer(self.init_std, x.shape[-1])
      return Dense(
        features=features, kernel_init=init, dtype=self.dtype, name=name
      )(x)

    steps = grid[0]
    rows = len(features), steps
    patches = project(features, self.width, 'embed')
    conditions = [
      project(actions, self.width, 'action_encoder'),
      project(states, self.width, 'state_encoder'),
    ]
    if self.extrinsics_dim and self.is_initializing():
      extrinsics = jnp.zeros((*rows, self.extrinsics_dim))
    if extrinsics is not None:
      conditions += [project(extrinsics, self.width, 'extrinsics_encoder')]
    count = len(conditions)
    x = jnp.concatenate(
      [
        jnp.stack(conditions, axis=2),
        patches.reshape(*rows, -1, self.width),
      ],
      axis=2,
    )  # [B, T, count + H * W, width]
    per_step = x.shape[2]
    x = x.reshape(len(x), -1, self.width)
    places = compute_coordinates(jnp.arange(patches.shape[1]), grid)
    places = places.reshape(steps, -1, 3)
    # What conditions a step is at its time, and in the corner of the frame.
    corner = jnp.repeat(places[:, :1], count, axis=1)
    x, rope = encode_positions(
      x,
      jnp.arange(x.shape[1])[None],
      grid,
      self.positions,
      self.width // self.num_heads,
      jnp.concatenate([corner, places], axis=1).reshape(-1, 3),
    )
    x = transformer.Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_dim=4 * self.width,
      mask=block_causal(per_step),
      **self.get_options(),
      name='transformer',
    )(x, rope)
    x = x.reshape(*rows, per_step, -1)[:, :, count:]
    x = transformer.LayerNorm(dtype=self.dtype, name='norm')(x)
    return project(x.reshape(patches.shape), self.out_width, 'proj')

  def init_params(self, key: jax.Array) -> Any:
    """Initialises the parameters; frames of any size will do."""
    shapes = (1, 2, self.out_width), (1, 1, self.action_dim)
    inputs = map(jnp.zeros, (*shapes, (1, 1, self.state_dim)))
    return self.init(key, *inputs, (1, 1, 2))['params']
