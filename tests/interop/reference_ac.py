"""V-JEPA 2-AC's predictor and loss in torch, from the paper, in any precision.

An independent reference, with the names and shapes of the published file.
"""

import torch
from torch import nn
from torch.nn import functional

from tests.interop.reference import Mlp


def _place(x, places):
  """Turns heads [B, heads, N, d]; places are (t,) or (t, h, w) of a token.

  What has no height and no width is turned in the first third alone.
  """
  half = x.shape[-1] // 3 // 2
  omega = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
  angle = torch.zeros(len(places), x.shape[-1], dtype=x.dtype)
  for token, place in enumerate(places):
    for axis, position in enumerate(place):
      first = 2 * half * axis
      angle[token, first : first + 2 * half] = position * torch.cat([omega] * 2)
  partner = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
  return x * angle.cos() + partner * angle.sin()


class Attention(nn.Module):
  def __init__(self, dim, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(dim, 3 * dim)
    self.proj = nn.Linear(dim, dim)

  def forward(self, x, places):
    b, n, d = x.shape
    qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = _place(q, places), _place(k, places)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = [[other[0] > place[0] for other in places] for place in places]
    logits = logits.masked_fill(torch.tensor(hidden), -torch.inf)
    return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
  def __init__(self, dim, heads):
    super().__init__()
    self.norm1 = nn.LayerNorm(dim, eps=1e-6)
    self.attn = Attention(dim, heads)
    self.norm2 = nn.LayerNorm(dim, eps=1e-6)
    self.mlp = Mlp(dim, 4 * dim)

  def forward(self, x, places):
    x = x + self.attn(self.norm1(x), places)
    return x + self.mlp(self.norm2(x))


class Predictor(nn.Module):
  """The predictor; `sides` are those of a frame in patches."""

  def __init__(self, dim, width, depth, heads, sides, action_dim=7):
    super().__init__()
    self.sides = sides
    self.predictor_embed = nn.Linear(dim, width)
    self.action_encoder = nn.Linear(action_dim, width)
    self.state_encoder = nn.Linear(action_dim, width)
    self.extrinsics_encoder = nn.Linear(6, width)
    self.predictor_blocks = nn.ModuleList(
      Block(width, heads) for _ in range(depth)
    )
    self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
    self.predictor_proj = nn.Linear(width, dim)

  def forward(self, frames, actions, states, extrinsics=None):
    """Frames [B, T, HW, D] to predictions of those after them, the same."""
    tokens, places = [], []
    for t in range(frames.shape[1]):
      conditions = [
        self.action_encoder(actions[:, t]),
        self.state_encoder(states[:, t]),
      ]
      if extrinsics is not None:
        conditions.append(self.extrinsics_encoder(extrinsics[:, t]))
      for x in conditions:
        tokens.append(x)
        places.append((t,))
      patches = self.predictor_embed(frames[:, t])
      for i, x in enumerate(patches.unbind(1)):
        tokens.append(x)
        places.append((t, i // self.sides[1], i % self.sides[1]))
    x = torch.stack(tokens, dim=1)
    for block in self.predictor_blocks:
      x = block(x, places)
    is_patch = [len(place) == 3 for place in places]
    x = self.predictor_proj(self.predictor_norm(x[:, is_patch]))
    return x.reshape(frames.shape)


def normalize_tokens(x):
  return functional.layer_norm(x, x.shape[-1:], eps=1e-5)


def encode(encoder, video):
  """Normalised video [B, 3, T, H, W] to normalised features [B, T, HW, D]."""
  frames = []
  for frame in video.unbind(2):
    frames.append(normalize_tokens(encoder(torch.stack([frame, frame], 2))))
  return torch.stack(frames, dim=1)


def compute_losses(
  predictor, frames, actions, states, rollout_steps=2, power=1
):
  """Teacher forcing and rollout, equations 2 and 3, of [B, T, HW, D]."""

  def run(frames):
    n = frames.shape[1]
    return normalize_tokens(predictor(frames, actions[:, :n], states[:, :n]))

  def compare(a, b):
    return (a - b).abs().pow(power).mean() / power

  forced = run(frames[:, :-1])
  context = torch.cat([frames[:, :1], forced[:, :1]], dim=1)
  for _ in range(rollout_steps - 1):
    context = torch.cat([context, run(context)[:, -1:]], dim=1)
  truth = frames[:, 1 : rollout_steps + 1]
  return compare(forced, frames[:, 1:]), compare(context[:, 1:], truth)
