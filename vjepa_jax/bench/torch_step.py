"""The same training step in eager torch: the peer of the benchmark `step`.

Written as one would for speed on a CPU: fused attention, a fused optimizer,
tubelets gathered before they are embedded. Parameters have the names and shapes
of the published checkpoints.
"""

from collections.abc import Mapping, Sequence
import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from vjepa_jax.models.positions import Grid, make_sincos_table
from vjepa_jax.models.tubelets import PIXEL_MEAN, PIXEL_STD

Masks = Sequence[Mapping[str, torch.Tensor]]


def _take(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
  """Picks tokens `ids` `[B, K]` of `x` `[B, N, D]` -> `[B, K, D]`."""
  return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


class _Attention(nn.Module):
  """Self-attention with a fused projection."""

  def __init__(self, width: int, num_heads: int):
    super().__init__()
    self.num_heads = num_heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    b, n, d = x.shape
    qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    heads = functional.scaled_dot_product_attention(q, k, v)
    return self.proj(heads.transpose(1, 2).reshape(b, n, d))


class _Mlp(nn.Module):
  """Two-layer perceptron with exact GELU."""

  def __init__(self, width: int, hidden: int):
    super().__init__()
    self.fc1 = nn.Linear(width, hidden)
    self.fc2 = nn.Linear(hidden, width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(functional.gelu(self.fc1(x)))


class _Block(nn.Module):
  """Pre-norm transformer block."""

  def __init__(self, width: int, num_heads: int, hidden: int):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = _Attention(width, num_heads)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = _Mlp(width, hidden)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class _TubeletEmbed(nn.Module):
  """The published convolution, applied to the tubelets that are seen."""

  def __init__(self, width: int, tubelet: tuple[int, int, int]):
    super().__init__()
    self.proj = nn.Conv3d(3, width, tubelet, stride=tubelet)

  def forward(self, tubelets: torch.Tensor) -> torch.Tensor:
    kernel = self.proj.weight.flatten(1)  # [D, P]
    return functional.linear(tubelets, kernel, self.proj.bias)


class Encoder(nn.Module):
  """The encoder of V-JEPA 1 on flattened tubelets."""

  def __init__(self, encoder: Any, grid: Grid):
    """Takes the sizes of `vjepa_jax.models.encoder.Encoder`."""
    super().__init__()
    self.patch_embed = _TubeletEmbed(encoder.width, encoder.tubelet)
    self.register_buffer(
      'pos_embed',
      torch.from_numpy(make_sincos_table(grid, encoder.width))[None],
      persistent=False,
    )
    self.blocks = nn.ModuleList(
      _Block(encoder.width, encoder.num_heads, encoder.mlp_dim)
      for _ in range(encoder.depth)
    )
    self.norm = nn.LayerNorm(encoder.width, eps=1e-6)

  def forward(
    self, tubelets: torch.Tensor, ids: torch.Tensor | None = None
  ) -> torch.Tensor:
    """Maps tubelets `[B, N, P]` to features `[B, K, D]` of `ids`."""
    positions = self.pos_embed
    if ids is not None:
      tubelets = _take(tubelets, ids)
      positions = self.pos_embed[0][ids]
    x = self.patch_embed(tubelets) + positions
    for block in self.blocks:
      x = block(x)
    return self.norm(x)


class Predictor(nn.Module):
  """The predictor of V-JEPA 1."""

  def __init__(self, predictor: Any, grid: Grid):
    """Takes the sizes of `vjepa_jax.models.predictor.Predictor`."""
    super().__init__()
    width = predictor.width
    self.predictor_embed = nn.Linear(predictor.out_width, width)
    self.mask_tokens = nn.ParameterList(
      nn.Parameter(torch.zeros(1, 1, width))
      for _ in range(predictor.num_mask_tokens)
    )
    self.register_buffer(
      'pos_embed',
      torch.from_numpy(make_sincos_table(grid, width)),
      persistent=False,
    )
    self.predictor_blocks = nn.ModuleList(
      _Block(width, predictor.num_heads, 4 * width)
      for _ in range(predictor.depth)
    )
    self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
    self.predictor_proj = nn.Linear(width, predictor.out_width)

  def forward(
    self,
    context: torch.Tensor,
    context_ids: torch.Tensor,
    target_ids: torch.Tensor,
    index: int,
  ) -> torch.Tensor:
    """Predicts the features `[B, Kt, D]` of `target_ids`."""
    token = self.mask_tokens[index % len(self.mask_tokens)]
    token = token.expand(*target_ids.shape, -1)
    x = torch.cat([self.predictor_embed(context), token], dim=1)
    x = x + self.pos_embed[torch.cat([context_ids, target_ids], dim=1)]
    for block in self.predictor_blocks:
      x = block(x)
    return self.predictor_proj(self.predictor_norm(x[:, context.shape[1] :]))


def cut_tubelets(
  video: torch.Tensor, tubelet: tuple[int, int, int]
) -> torch.Tensor:
  """Normalises uint8 `[B, T, H, W, 3]` and cuts it: float32 `[B, N, P]`."""
  scale = torch.tensor([1 / s for s in PIXEL_STD])
  offset = torch.tensor(PIXEL_MEAN) * scale
  (b, frames, height, width, _), (t, h, w) = video.shape, tubelet
  x = (video.float() * scale - offset).reshape(
    b, frames // t, t, height // h, h, width // w, w, 3
  )
  # The order of a convolution's kernel: colour, frame, row, column.
  x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
  return x.reshape(b, -1, 3 * t * h * w)


class TorchStep:
  """Models, optimizer and target, advanced by one step a call."""

  def __init__(
    self,
    encoder: Any,
    predictor: Any,
    grid: Grid,
    weights: Mapping[str, Mapping[str, np.ndarray]],
    schedules: Mapping[str, float],
  ):
    """Builds modules of the sizes of ours, with their weights.

    Args:
      encoder: our encoder.
      predictor: our predictor.
      grid: tubelet grid of the clips.
      weights: 'encoder' and 'predictor' in the published layout.
      schedules: 'learning_rate', 'weight_decay' and 'ema', held constant.
    """
    self._tubelet = encoder.tubelet
    self._momentum = schedules['ema']
    self._encoder = Encoder(encoder, grid)
    self._predictor = Predictor(predictor, grid)
    for name, module in (
      ('encoder', self._encoder),
      ('predictor', self._predictor),
    ):
      module.load_state_dict(
        {k: torch.tensor(v) for k, v in weights[name].items()}
      )
    self._target = copy.deepcopy(self._encoder).requires_grad_(False)
    named = [
      *self._encoder.named_parameters(),
      *self._predictor.named_parameters(),
    ]
    decayed = [p for n, p in named if p.ndim > 1 and 'bias' not in n]
    others = [p for n, p in named if p.ndim == 1 or 'bias' in n]
    self._optimizer = torch.optim.AdamW(
      [
        {'params': decayed, 'weight_decay': schedules['weight_decay']},
        {'params': others, 'weight_decay': 0.0},
      ],
      lr=schedules['learning_rate'],
      fused=True,
    )

  def __call__(self, video: np.ndarray, masks: Sequence[Any]) -> float:
    """Takes one step on a batch of ours; returns its loss."""
    tubelets = cut_tubelets(torch.from_numpy(video), self._tubelet)
    masks = [
      {k: torch.from_numpy(v).long() for k, v in mask.items()} for mask in masks
    ]
    loss = self._compute_loss(tubelets, masks)
    self._optimizer.zero_grad()
    loss.backward()
    self._optimizer.step()
    with torch.no_grad():
      target = list(self._target.parameters())
      torch._foreach_lerp_(
        target, list(self._encoder.parameters()), 1 - self._momentum
      )
    return loss.item()

  def _compute_loss(self, tubelets: torch.Tensor, masks: Masks) -> torch.Tensor:
    with torch.no_grad():
      features = self._target(tubelets)
      features = functional.layer_norm(features, features.shape[-1:])
    loss = 0.0
    for i, mask in enumerate(masks):
      context = self._encoder(tubelets, mask['context'])
      predicted = self._predictor(context, mask['context'], mask['target'], i)
      loss = loss + functional.l1_loss(
        predicted, _take(features, mask['target'])
      )
    return loss / len(masks)
