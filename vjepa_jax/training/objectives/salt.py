"""SALT: pixels teach a teacher, and its frozen features a student.

Li et al. 2025 (arXiv 2509.24317). The average of the encoder is kept in both
stages, and is what is evaluated.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.models.tubelets import gather_tokens, patchify
from vjepa_jax.training.objectives import base
from vjepa_jax.training.objectives.targets import choose_targets
from vjepa_jax.training.objectives.vjepa import VJepa


def normalize_tubelets(tubelets: jax.Array) -> jax.Array:
  """Standardises each colour of each flattened tubelet (VideoMAE).

  Args:
    tubelets: Pixels `[..., t * p * p * 3]` as of `patchify`.

  Returns:
    float32 of the same shape. A hundredth of full scale is added to the
    deviation, or flat tubelets would be nothing but noise.
  """
  shape = tubelets.shape
  x = tubelets.astype(jnp.float32).reshape(*shape[:-1], -1, 3) / 255.0
  x = x - x.mean(axis=-2, keepdims=True)
  std = jnp.sqrt(jnp.square(x).mean(axis=-2, keepdims=True))
  return (x / (std + 0.01)).reshape(shape)


@dataclasses.dataclass(frozen=True)
class PixelTargets:
  """Normalised pixels of the hidden tubelets."""

  tubelet: tuple[int, int, int]
  whole_batch = None

  @property
  def width(self) -> int:
    """Numbers of a tubelet."""
    return 3 * math.prod(self.tubelet)

  def encode(self, params: Any, stream: base.Batch) -> list[jax.Array]:
    del params  # there are none
    with jax.named_scope('target_encoder'):
      clip = normalize_tubelets(patchify(stream['pixels'], self.tubelet))
    clip = jax.lax.stop_gradient(clip)
    return [gather_tokens(clip, mask['target']) for mask in stream['masks']]


def build(
  setup: base.Setup,
  *,
  teacher: str,
  target_norm: str,
  target_view: str,
  **options: Any,
) -> VJepa:
  """Builds a stage: the first without a teacher, the second with its workdir.

  With a teacher that V-JEPA trained the second is distillation (V-JEPA 2.1,
  arXiv 2603.14482, without the dense loss).
  """
  if teacher:
    targets, options['teacher'] = choose_targets(
      setup, teacher, target_norm, target_view
    )
  else:
    targets = PixelTargets(tuple(setup.encoder.tubelet))
  predictor = setup.build_predictor(out_width=targets.width)
  names = setup.mask_names['video']
  return VJepa(setup.encoder, predictor, targets, names, **options)
