"""The same training step in eager torch: the peer of the benchmark `step`.

Written as one would for speed on a CPU: fused attention, a fused optimizer,
tubelets gathered before they are embedded. Parameters have the names and shapes
of the published checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vjepa_jax.models.positions import Grid, make_sincos_table
from vjepa_jax.models.tubelets import PIXEL_MEAN, PIXEL_STD

_Params = dict[str, torch.Tensor]


def _take(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
  """Picks tokens `ids` `[B, K]` of `x` `[B, N, D]` -> `[B, K, D]`."""
  return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def _linear(params: _Params, name: str, x: torch.Tensor) -> torch.Tensor:
  # Flattened: the published embedding is a convolution.
  kernel = params[f'{name}.weight'].flatten(1)
  return functional.linear(x, kernel, params[f'{name}.bias'])


def _norm(params: _Params, name: str, x: torch.Tensor) -> torch.Tensor:
  scale, bias = params[f'{name}.weight'], params[f'{name}.bias']
  return functional.layer_norm(x, x.shape[-1:], scale, bias, eps=1e-6)


def _apply_blocks(
  model: Any, params: _Params, prefix: str, x: torch.Tensor
) -> torch.Tensor:
  """Applies the pre-norm blocks of a model to `x` `[B, N, D]`."""
  for i in range(model.depth):
    name = f'{prefix}.{i}'
    y = _linear(params, f'{name}.attn.qkv', _norm(params, f'{name}.norm1', x))
    y = y.unflatten(-1, (3, model.num_heads, -1)).permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(*y)
    x = x + _linear(params, f'{name}.attn.proj', y.transpose(1, 2).flatten(2))
    y = _linear(params, f'{name}.mlp.fc1', _norm(params, f'{name}.norm2', x))
    x = x + _linear(params, f'{name}.mlp.fc2', functional.gelu(y))
  return x


def _cut_tubelets(
  video: torch.Tensor, tubelet: tuple[int, int, int]
) -> torch.Tensor:
  """Normalises uint8 `[B, T, H, W, 3]` and cuts it: float32 `[B, N, P]`."""
  scale = torch.tensor([1 / s for s in PIXEL_STD])
  video = video.float() * scale - torch.tensor(PIXEL_MEAN) * scale
  for axis, size in zip((1, 3, 5), tubelet, strict=True):
    video = video.unflatten(axis, (-1, size))
  # [B, T/t, t, H/h, h, W/w, w, 3] -> [B, N, 3 * t * h * w], colour first as in
  # the kernel of a convolution.
  return video.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4).flatten(1, 3)


class TorchStep:
  """Parameters, optimizer and target, updated by one step a call."""

  def __init__(
    self,
    encoder: Any,
    predictor: Any,
    grid: Grid,
    weights: Mapping[str, Mapping[str, np.ndarray]],
    schedules: Mapping[str, float],
  ):
    """Takes the sizes of our models, and their weights.

    Args:
      encoder: Our encoder, of V-JEPA 1.
      predictor: Our predictor.
      grid: Tubelet grid of the clips.
      weights: 'encoder' and 'predictor' in the published layout.
      schedules: 'learning_rate', 'weight_decay' and 'ema', held constant.
    """
    self._encoder, self._predictor = encoder, predictor
    self._positions, self._predictor_positions = (
      torch.from_numpy(make_sincos_table(grid, model.width))
      for model in (encoder, predictor)
    )
    self._params, self._predictor_params = (
      {
        name: torch.tensor(x, requires_grad=True)
        for name, x in weights[model].items()
      }
      for model in ('encoder', 'predictor')
    )
    self._target = {k: x.detach().clone() for k, x in self._params.items()}
    self._momentum = schedules['ema']
    groups = [], []
    for params in (self._params, self._predictor_params):
      for name, x in params.items():
        groups[x.ndim > 1 and 'bias' not in name].append(x)
    self._optimizer = torch.optim.AdamW(
      [
        {'params': groups[0], 'weight_decay': 0.0},
        {'params': groups[1], 'weight_decay': schedules['weight_decay']},
      ],
      lr=schedules['learning_rate'],
      fused=True,
    )

  def __call__(self, stream: Mapping[str, Any]) -> float:
    """Takes one step on a stream of our batches; returns its loss."""
    video, masks = torch.from_numpy(stream['pixels']), stream['masks']
    tubelets = _cut_tubelets(video, self._encoder.tubelet)
    with torch.no_grad():
      features = self._encode(self._target, tubelets, slice(None))
      features = functional.layer_norm(features, features.shape[-1:])
    loss = 0.0
    for i, mask in enumerate(masks):
      ids = {k: torch.from_numpy(v).long() for k, v in mask.items()}
      context = _take(tubelets, ids['context'])
      context = self._encode(self._params, context, ids['context'])
      predicted = self._predict(context, ids, i)
      target = _take(features, ids['target'])
      loss = loss + functional.l1_loss(predicted, target)
    loss = loss / len(masks)
    self._optimizer.zero_grad()
    loss.backward()
    self._optimizer.step()
    with torch.no_grad():
      torch._foreach_lerp_(
        list(self._target.values()),
        list(self._params.values()),
        1 - self._momentum,
      )
    return loss.item()

  def _encode(
    self, params: _Params, tubelets: torch.Tensor, ids: torch.Tensor | slice
  ) -> torch.Tensor:
    """Maps tubelets `[B, K, P]` at `ids` to features `[B, K, D]`."""
    x = _linear(params, 'patch_embed.proj', tubelets) + self._positions[ids]
    x = _apply_blocks(self._encoder, params, 'blocks', x)
    return _norm(params, 'norm', x)

  def _predict(
    self, context: torch.Tensor, ids: Mapping[str, torch.Tensor], index: int
  ) -> torch.Tensor:
    """Predicts the features `[B, Kt, D]` of the target ids."""
    params = self._predictor_params
    index %= self._predictor.num_mask_tokens
    tokens = params[f'mask_tokens.{index}'].expand(*ids['target'].shape, -1)
    x = torch.cat([_linear(params, 'predictor_embed', context), tokens], dim=1)
    ids = torch.cat([ids['context'], ids['target']], dim=1)
    x = x + self._predictor_positions[ids]
    x = _apply_blocks(self._predictor, params, 'predictor_blocks', x)
    x = _norm(params, 'predictor_norm', x[:, context.shape[1] :])
    return _linear(params, 'predictor_proj', x)
