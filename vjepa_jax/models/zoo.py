"""The named model sizes."""

from typing import Any, NamedTuple

from vjepa_jax.errors import UserError
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.options import check_choice
from vjepa_jax.models.predictor import Predictor


class Size(NamedTuple):
  """Dimensions of an encoder."""

  width: int
  depth: int
  num_heads: int
  mlp_dim: int


# The published ViTs, and three small ones for tests and for one machine.
# 'giant' is the ViT-g of V-JEPA 2, whose heads are 64 wide.
SIZES = {
  'nano': Size(48, 2, 2, 192),
  'mini': Size(128, 4, 2, 512),
  'micro': Size(192, 6, 3, 768),
  'tiny': Size(192, 12, 3, 768),
  'small': Size(384, 12, 6, 1536),
  'base': Size(768, 12, 12, 3072),
  'large': Size(1024, 24, 16, 4096),
  'huge': Size(1280, 32, 16, 5120),
  'giant': Size(1408, 40, 22, 6144),
  'gigantic': Size(1664, 48, 26, 8192),
}

# The levels of V-JEPA 2.1 by depth: blocks counted from 0, as in its code (the
# paper's third of the gigantic is two blocks earlier).
LEVELS = {
  12: (2, 5, 8, 11),
  24: (5, 11, 17, 23),
  40: (9, 19, 29, 39),
  48: (11, 23, 37, 47),
}


def get_levels(depth: int) -> tuple[int, ...]:
  """Returns the levels of `LEVELS`; of other depths the ends of the quarters.

  Encoders of fewer than four blocks have fewer levels.
  """
  quarters = {-(-depth * i // 4) - 1 for i in range(1, 5)}
  return LEVELS.get(depth, tuple(sorted(quarters)))


def build_encoder(
  size: str, *, levels: bool | tuple[int, ...] = False, **fields: Any
) -> Encoder:
  """Builds the encoder of a named size.

  Args:
    size: One of `SIZES`.
    levels: Blocks of `Encoder.levels`; True for those of `get_levels`.
    **fields: Others of `Encoder`.
  """
  check_choice('encoder size', size, SIZES)
  if levels is True:
    levels = get_levels(SIZES[size].depth)
  return Encoder(**SIZES[size]._asdict(), levels=levels or (), **fields)


def build_predictor(
  encoder: Encoder,
  *,
  num_heads: int | None,
  out_width: int | None = None,
  **fields: Any,
) -> Predictor:
  """Builds the predictor that goes with an encoder.

  Args:
    encoder: Decides width, positions, initialisation, kernels and dtype.
    num_heads: Attention heads; None for as many as the encoder (V-JEPA 1).
    out_width: What is predicted of a token; None for the encoder's features.
    **fields: Others of `Predictor`.

  Raises:
    UserError: The heads do not divide the width.
  """
  num_heads = num_heads or encoder.num_heads
  predictor = Predictor(
    out_width=out_width or encoder.width,
    num_heads=num_heads,
    positions=encoder.positions,
    modalities=encoder.modalities,
    **encoder.get_options(),
    **fields,
  )
  _check_heads(predictor)
  return predictor


def build_action_predictor(encoder: Encoder, **fields: Any) -> ActionPredictor:
  """Builds the action-conditioned predictor that goes with an encoder.

  Args:
    encoder: Decides what is predicted, kernels and dtype.
    **fields: Those of `ActionPredictor`.

  Raises:
    UserError: The heads do not divide the width.
  """
  options = encoder.get_options() | fields
  predictor = ActionPredictor(out_width=encoder.width, **options)
  _check_heads(predictor)
  return predictor


def _check_heads(predictor: Predictor | ActionPredictor) -> None:
  if predictor.width % predictor.num_heads:
    raise UserError(
      f'predictor width {predictor.width} is not divisible by its '
      f'{predictor.num_heads} heads'
    )
