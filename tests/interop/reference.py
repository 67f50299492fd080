"""V-JEPA's encoder, predictor and training loop in torch, from the papers.

An independent reference for tests: it shares no code with the package, has the
names and shapes of the published checkpoints, and float64 where it is cheap.
"""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def sincos_table(grid, dim):
  """Fixed positions, t then h then w with the same power: float [N, dim]."""
  part = 2 * math.ceil(dim / 6)
  rows = []
  for t in range(grid[0]):
    for h in range(grid[1]):
      for w in range(grid[2]):
        row = []
        for position in (t, h, w):
          angles = position / 10000 ** (np.arange(part // 2) / (part / 2))
          row += [*np.sin(angles), *np.cos(angles)]
        rows.append(row[:dim])
  return torch.tensor(np.array(rows), dtype=torch.float32)


def turn(x, ids, grid, tiled, rescaled=False):
  """3-D RoPE of x [B, heads, N, d]; `tiled` as in V-JEPA 2's weights."""
  axis_dim = 2 * (x.shape[-1] // 3 // 2)
  half = axis_dim // 2
  frame = grid[1] * grid[2]
  positions = (ids // frame, ids % frame // grid[2], ids % grid[2])
  if rescaled:
    t, h, w = positions
    positions = t, h * (15 / (grid[1] - 1)), w * (15 / (grid[2] - 1))
  omega = 10000.0 ** (-torch.arange(half) / half)
  parts = []
  for axis, position in enumerate(positions):
    y = x[..., axis * axis_dim : (axis + 1) * axis_dim]
    angle = position[:, None, :, None].float() * omega
    if tiled:
      angle = torch.cat([angle, angle], dim=-1)
    else:
      angle = angle.repeat_interleave(2, dim=-1)
    partner = torch.stack([-y[..., 1::2], y[..., 0::2]], dim=-1).flatten(-2)
    parts.append(y * angle.cos() + partner * angle.sin())
  return torch.cat([*parts, x[..., 3 * axis_dim :]], dim=-1)


class Attention(nn.Module):
  def __init__(self, dim, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(dim, 3 * dim)
    self.proj = nn.Linear(dim, dim)

  def forward(self, x, rope):
    b, n, d = x.shape
    qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if rope is not None:
      q, k = turn(q, *rope), turn(k, *rope)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
  def __init__(self, dim, hidden):
    super().__init__()
    self.fc1 = nn.Linear(dim, hidden)
    self.fc2 = nn.Linear(hidden, dim)

  def forward(self, x):
    return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
  def __init__(self, dim, heads, hidden):
    super().__init__()
    self.norm1 = nn.LayerNorm(dim, eps=1e-6)
    self.attn = Attention(dim, heads)
    self.norm2 = nn.LayerNorm(dim, eps=1e-6)
    self.mlp = Mlp(dim, hidden)

  def forward(self, x, rope):
    x = x + self.attn(self.norm1(x), rope)
    return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
  def __init__(self, dim, tubelet):
    super().__init__()
    self.proj = nn.Conv3d(3, dim, tubelet, stride=tubelet)

  def forward(self, x):
    return self.proj(x).flatten(2).transpose(1, 2)


def take(x, ids):
  return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


class Encoder(nn.Module):
  """Context and target encoder; `positions` 'sincos', 'tiled' or 'exact'."""

  def __init__(self, dim, depth, heads, tubelet, grid, positions):
    super().__init__()
    self.grid, self.positions = grid, positions
    self.patch_embed = PatchEmbed(dim, tubelet)
    if positions == 'sincos':
      self.register_buffer('pos_embed', sincos_table(grid, dim)[None])
    self.blocks = nn.ModuleList(
      Block(dim, heads, 4 * dim) for _ in range(depth)
    )
    self.norm = nn.LayerNorm(dim, eps=1e-6)

  def forward(self, video, ids=None):
    """Normalised video [B, 3, T, H, W] to features [B, K, D]."""
    x = self.patch_embed(video)
    rope = None
    if self.positions == 'sincos':
      x = x + self.pos_embed
    if ids is not None:
      x = take(x, ids)
    else:
      ids = torch.arange(x.shape[1]).expand(len(x), -1)
    if self.positions != 'sincos':
      rope = (ids, self.grid, self.positions == 'tiled')
    for block in self.blocks:
      x = block(x, rope)
    return self.norm(x)


class Predictor(nn.Module):
  def __init__(self, dim, width, depth, heads, num_tokens, grid, positions):
    super().__init__()
    self.grid, self.positions = grid, positions
    self.predictor_embed = nn.Linear(dim, width)
    self.mask_tokens = nn.ParameterList(
      nn.Parameter(torch.zeros(1, 1, width)) for _ in range(num_tokens)
    )
    if positions == 'sincos':
      table = sincos_table(grid, width)[None]
      self.register_buffer('predictor_pos_embed', table)
    self.predictor_blocks = nn.ModuleList(
      Block(width, heads, 4 * width) for _ in range(depth)
    )
    self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
    self.predictor_proj = nn.Linear(width, dim)

  def forward(self, context, context_ids, target_ids, index):
    token = self.mask_tokens[index % len(self.mask_tokens)]
    x = torch.cat(
      [
        self.predictor_embed(context),
        token.expand(len(context), target_ids.shape[1], -1),
      ],
      dim=1,
    )
    ids = torch.cat([context_ids, target_ids], dim=1)
    rope = None
    if self.positions == 'sincos':
      x = x + take(self.predictor_pos_embed.expand(len(x), -1, -1), ids)
    else:
      rope = (ids, self.grid, self.positions == 'tiled')
    for block in self.predictor_blocks:
      x = block(x, rope)
    return self.predictor_proj(self.predictor_norm(x[:, context.shape[1] :]))


def randomize(module, seed):
  """Gives every parameter, biases and norms too, a value of its own."""
  generator = torch.Generator().manual_seed(seed)
  for parameter in module.parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    parameter.data.add_(0.05 * noise)


def normalize(video):
  """uint8 [B, T, H, W, 3] to normalised float [B, 3, T, H, W]."""
  mean = torch.tensor([0.485, 0.456, 0.406]) * 255
  std = torch.tensor([0.229, 0.224, 0.225]) * 255
  video = (torch.tensor(video).float() - mean) / std
  return video.permute(0, 4, 1, 2, 3)


def train(encoder, predictor, batches, schedules, clip_norm, clip_start):
  """Trains as published; returns the losses and the target encoder."""
  target = copy.deepcopy(encoder)
  groups = []
  for module in (encoder, predictor):
    named = list(module.named_parameters())
    for decays in (True, False):
      members = [
        p for n, p in named if ('bias' not in n and p.ndim > 1) == decays
      ]
      groups.append({'params': members, 'decays': decays})
  optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
  losses = []
  for step, batch in enumerate(batches):
    for group in optimizer.param_groups:
      group['lr'] = schedules['learning_rate'](step)
      decay = schedules['weight_decay'](step)
      group['weight_decay'] = decay if group['decays'] else 0.0
    video = normalize(batch['video']['pixels'])
    with torch.no_grad():
      h = target(video)
      h = functional.layer_norm(h, h.shape[-1:])
    loss = 0.0
    for i, mask in enumerate(batch['video']['masks']):
      ids = {k: torch.tensor(v).long() for k, v in mask.items()}
      context = encoder(video, ids['context'])
      z = predictor(context, ids['context'], ids['target'], i)
      loss = loss + (z - take(h, ids['target'])).abs().mean()
    loss = loss / len(batch['video']['masks'])
    optimizer.zero_grad()
    loss.backward()
    if step >= clip_start:
      for module in (encoder, predictor):
        nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    optimizer.step()
    momentum = schedules['ema'](step)
    with torch.no_grad():
      for old, new in zip(
        target.parameters(), encoder.parameters(), strict=True
      ):
        old.mul_(momentum).add_((1 - momentum) * new)
    losses.append(loss.item())
  return losses, target
