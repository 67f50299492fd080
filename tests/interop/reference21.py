"""V-JEPA 2.1's encoder, predictor and loss in torch, from the paper.

An independent reference, with the names and shapes of the published files.
"""

import numpy as np
from scipy import ndimage
import torch
from torch import nn
from torch.nn import functional

from tests.interop.reference import Block, PatchEmbed, normalize, take


def _vectors(dim):
  return nn.Parameter(1e-6 * torch.randn(1, 1, dim))


class Encoder(nn.Module):
  """Encoder of videos and images with a LayerNorm a level."""

  def __init__(self, dim, depth, heads, tubelet, levels):
    super().__init__()
    self.tubelet, self.levels = tubelet, levels
    self.patch_embed = PatchEmbed(dim, tubelet)
    self.patch_embed_img = PatchEmbed(dim, (1, *tubelet[1:]))
    self.video_mod_embed, self.img_mod_embed = _vectors(dim), _vectors(dim)
    self.blocks = nn.ModuleList(
      Block(dim, heads, 4 * dim) for _ in range(depth)
    )
    self.norms_block = nn.ModuleList(
      nn.LayerNorm(dim, eps=1e-6) for _ in levels
    )

  def forward(self, video, ids=None):
    """Normalised video [B, 3, T, H, W] to all levels [B, K, 4 D]."""
    frames, *sides = video.shape[2:]
    if frames == 1:
      x = self.patch_embed_img(video) + self.img_mod_embed
    else:
      x = self.patch_embed(video) + self.video_mod_embed
    grid = (
      max(frames // self.tubelet[0], 1),
      *(s // t for s, t in zip(sides, self.tubelet[1:], strict=True)),
    )
    if ids is not None:
      x = take(x, ids)
    else:
      ids = torch.arange(x.shape[1]).expand(len(x), -1)
    outputs = []
    for i, block in enumerate(self.blocks):
      x = block(x, (ids, grid, False, True))
      if i in self.levels:
        outputs.append(self.norms_block[len(outputs)](x))
    return torch.cat(outputs, dim=-1)


class Predictor(nn.Module):
  """Predictor with two heads; `rescaled` as in training, not as on the hub."""

  def __init__(
    self, dim, levels, out, width, depth, heads, num_tokens, rescaled=True
  ):
    super().__init__()
    self.rescaled = rescaled
    if levels > 1:
      self.predictor_embed = nn.Sequential(
        nn.Linear(levels * dim, dim), nn.GELU(), nn.Linear(dim, width)
      )
    else:
      self.predictor_embed = nn.Linear(dim, width)
    self.mask_tokens = nn.ParameterList(
      nn.Parameter(torch.zeros(1, 1, width)) for _ in range(num_tokens)
    )
    self.video_mod_embed, self.img_mod_embed = _vectors(width), _vectors(width)
    self.predictor_blocks = nn.ModuleList(
      Block(width, heads, 4 * width) for _ in range(depth)
    )
    self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
    self.predictor_proj = nn.Linear(width, out)
    self.predictor_proj_context = nn.Linear(width, out)

  def forward(self, context, context_ids, target_ids, grid, image):
    """Predicts targets and context, [B, Kt, out] and [B, Kc, out]."""
    tokens = self.mask_tokens[0].expand(*target_ids.shape, -1)
    x = torch.cat([self.predictor_embed(context), tokens], dim=1)
    x = x + (self.img_mod_embed if image else self.video_mod_embed)
    ids = torch.cat([context_ids, target_ids], dim=1)
    for block in self.predictor_blocks:
      x = block(x, (ids, grid, False, self.rescaled))
    x = self.predictor_norm(x)
    visible, hidden = x.tensor_split([context.shape[1]], dim=1)
    return self.predictor_proj(hidden), self.predictor_proj_context(visible)


def weigh(context_ids, target_ids, grid):
  """Weights of visible tokens: by brute transform of distance, [B, Kc]."""
  weights = []
  for context, target in zip(context_ids, target_ids, strict=True):
    far = np.ones(int(np.prod(grid)))
    far[target] = 0
    distance = ndimage.distance_transform_edt(far.reshape(grid)).reshape(-1)
    weights.append(distance[context] ** -0.5)
  return torch.tensor(np.array(weights), dtype=torch.float32)


def normalize_levels(features, levels):
  """Normalises each of so many levels, end to end, without parameters."""
  chunks = features.chunk(levels, dim=-1)
  return torch.cat(
    [functional.layer_norm(x, x.shape[-1:]) for x in chunks], dim=-1
  )


def compute_loss(
  encoder, predictor, target, stream, grid, context_weight, *, levels, weighted
):
  """The dense loss of one stream; `levels` chunks of targets."""
  video = normalize(stream['pixels'])
  with torch.no_grad():
    truth = normalize_levels(target(video), levels)
  image = video.shape[2] == 1
  hidden_losses, visible_losses = [], []
  for mask in stream['masks']:
    context, hidden = (
      torch.tensor(np.asarray(mask[k])).long() for k in ('context', 'target')
    )
    outputs = predictor(encoder(video, context), context, hidden, grid, image)
    hidden_losses.append((outputs[0] - take(truth, hidden)).abs().mean())
    error = (outputs[1] - take(truth, context)).abs()
    if weighted:
      error = error * weigh(context.numpy(), hidden.numpy(), grid)[..., None]
    visible_losses.append(error.mean())
  return sum(hidden_losses) / len(hidden_losses) + context_weight * sum(
    visible_losses
  ) / len(visible_losses)
