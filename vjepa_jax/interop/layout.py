"""The tensor layouts of the official models, and ours.

The conversions are pure functions of mappings from key to numpy array, in the
names of the official code without its wrappers' prefixes. They rearrange
tensors and never compute, so that both directions are exact to the bit.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

import jax
import numpy as np

from vjepa_jax.models import zoo
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.probe import AttentiveProbe

Params = dict[str, Any]
State = Mapping[str, np.ndarray]


class WeightsError(ValueError):
  """Weights that cannot be used; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Weights:
  """Models and their parameters, as read from one place.

  Attributes:
    encoder: The encoder, None if there is none (a file of probes).
    encoder_params: Its parameters.
    predictor: The predictor, None if there is none or it was not asked for.
    predictor_params: Its parameters.
    probes: Probes and their parameters.
    resolution: Height and width of the clips in pixels, None if not known.
    frames: Frames of a clip, None if not known.
    unused: Keys of tensors that were read and have no use here.
  """

  encoder: Encoder | None = None
  encoder_params: Params | None = None
  predictor: Predictor | None = None
  predictor_params: Params | None = None
  probes: tuple[tuple[AttentiveProbe, Params], ...] = ()
  resolution: int | None = None
  frames: int | None = None
  unused: tuple[str, ...] = ()


class Tensors:
  """Tensors by key, checked when taken; remembers which were taken."""

  def __init__(self, state: State, name: str):
    """Wraps the tensors of one model; `name` is for messages."""
    self.name = name
    self._state = state
    self._taken = set()

  def __contains__(self, key: str) -> bool:
    return key in self._state

  def take(self, key: str, *shape: int | None) -> np.ndarray:
    """Returns a tensor of the shape, in which None fits any size.

    Raises:
      WeightsError: It is missing or has another shape.
    """
    if key not in self._state:
      raise WeightsError(f'{self.name} has no tensor {key!r}')
    value = self._state[key]
    if len(value.shape) != len(shape) or any(
      want not in (None, size)
      for want, size in zip(shape, value.shape, strict=True)
    ):
      wanted = ', '.join('any' if n is None else str(n) for n in shape)
      raise WeightsError(
        f'{self.name} is of another model: {key} has shape '
        f'{tuple(value.shape)}, not ({wanted})'
      )
    self._taken.add(key)
    return value

  def count_blocks(self, prefix: str) -> int:
    """Counts the blocks `prefix.0`, `prefix.1`, ..., also those with gaps."""
    pattern = re.compile(re.escape(prefix) + r'\.(\d+)\.')
    found = [int(m[1]) for key in self._state if (m := pattern.match(key))]
    if not found:
      raise WeightsError(f'{self.name} has no tensor {prefix}.0.norm1.weight')
    return max(found) + 1

  def check_all_taken(self, prefix: str) -> None:
    """Raises WeightsError if a tensor below `prefix` was not taken.

    A block with more in it than is known here computes something else.
    """
    for key in self._state:
      if key.startswith(f'{prefix}.') and key not in self._taken:
        raise WeightsError(
          f'{self.name} is of another model: {key} has no place in it'
        )

  def list_unused(self) -> list[str]:
    """Lists the keys that were not taken."""
    return [f'{self.name}/{k}' for k in self._state if k not in self._taken]


def convert_encoder(state: State, *, num_heads: int) -> Params:
  """Converts an official encoder.

  Args:
    state: Its tensors, keys without `module.backbone.`.
    num_heads: Attention heads, which no shape tells.

  Returns:
    Parameters of `models.encoder.Encoder`.

  Raises:
    WeightsError: A tensor is missing or has the wrong shape, or the encoder is
      of a kind that is not supported.
  """
  return convert_encoder_tensors(Tensors(state, 'encoder'), num_heads)


def convert_predictor(state: State, *, num_heads: int) -> Params:
  """Converts an official predictor, see `convert_encoder`.

  Returns:
    Parameters of `models.predictor.Predictor`.
  """
  return convert_predictor_tensors(Tensors(state, 'predictor'), num_heads)


def convert_probe(state: State, *, num_heads: int) -> Params:
  """Converts an official attentive probe, see `convert_encoder`.

  Returns:
    Parameters of the probe that `build_probe` builds: an `AttentiveProbe` if
    it has an output projection (V-JEPA 1) or self-attention blocks (V-JEPA 2).
  """
  return convert_probe_tensors(Tensors(state, 'probe'), num_heads)


def export_encoder(
  params: Params, *, tubelet: tuple[int, int, int] = (2, 16, 16)
) -> dict[str, np.ndarray]:
  """Inverts `convert_encoder`, bit for bit.

  Args:
    params: Parameters of an `Encoder`.
    tubelet: Its tubelet size in (frames, pixels, pixels).

  Raises:
    WeightsError: The tubelet is of another size.
  """
  params = jax.tree.map(np.asarray, params)
  kernel = params['embed']['proj']['kernel']  # [t * p * p * 3, D]
  if kernel.shape[0] != 3 * np.prod(tubelet):
    raise WeightsError(
      f'the encoder embeds {kernel.shape[0]} numbers a tubelet, a tubelet of '
      f'{tuple(tubelet)} has {3 * np.prod(tubelet)}'
    )
  kernel = kernel.reshape(*tubelet, 3, -1).transpose(4, 3, 0, 1, 2)
  return {
    'patch_embed.proj.weight': np.ascontiguousarray(kernel),
    'patch_embed.proj.bias': params['embed']['proj']['bias'],
    **_export_blocks(params, 'blocks'),
    **_export_norm(params['norm'], 'norm'),
  }


def export_predictor(params: Params) -> dict[str, np.ndarray]:
  """Inverts `convert_predictor`, bit for bit."""
  params = jax.tree.map(np.asarray, params)
  tokens = params['mask_tokens']
  return {
    **_export_linear(params['embed'], 'predictor_embed'),
    **{f'mask_tokens.{i}': token[None, None] for i, token in enumerate(tokens)},
    **_export_blocks(params, 'predictor_blocks'),
    **_export_norm(params['norm'], 'predictor_norm'),
    **_export_linear(params['proj'], 'predictor_proj'),
  }


def infer_num_heads(width: int, depth: int) -> int:
  """Looks up the heads of the named size that has this width and depth.

  Raises:
    WeightsError: No size has.
  """
  for size in zoo.SIZES.values():
    if (size.width, size.depth) == (width, depth):
      return size.num_heads
  raise WeightsError(
    f'no named size is {width} wide and {depth} deep: give its number of '
    'attention heads (num_heads)'
  )


def build_encoder(
  params: Params, *, num_heads: int, tubelet: tuple[int, ...], positions: str
) -> Encoder:
  """Builds the encoder that the parameters are of."""
  depth, width = params['transformer']['blocks']['norm1']['scale'].shape
  kernel = params['transformer']['blocks']['mlp']['fc1']['kernel']
  return Encoder(
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_dim=kernel.shape[-1],
    tubelet=tuple(tubelet),
    positions=positions,
    # Published by V-JEPA 2 only; matters for parameters made anew.
    scale_init_by_depth=positions != 'sincos',
  )


def build_predictor(
  params: Params, *, num_heads: int, positions: str
) -> Predictor:
  """Builds the predictor that the parameters are of."""
  depth, width = params['transformer']['blocks']['norm1']['scale'].shape
  return Predictor(
    out_width=params['proj']['bias'].shape[0],
    width=width,
    depth=depth,
    num_heads=num_heads,
    num_mask_tokens=params['mask_tokens'].shape[0],
    positions=positions,
    scale_init_by_depth=positions != 'sincos',
  )


def build_probe(
  params: Params, *, num_heads: int, epsilon: float = 1e-5
) -> AttentiveProbe:
  """Builds the probe that the parameters are of."""
  num_classes = params['classifier']['bias'].shape[0]
  depth = sum(name.startswith('block_') for name in params)
  project = 'out_proj' in params
  return AttentiveProbe(num_classes, num_heads, depth, project, epsilon)


def refuse_action_conditioned(predictor: State) -> None:
  """Raises WeightsError for the predictor of V-JEPA 2-AC."""
  if any(key.startswith('action_encoder') for key in predictor):
    raise WeightsError(
      'its predictor is action-conditioned (V-JEPA 2-AC), which is not '
      'supported; with_predictor=False reads the encoder alone'
    )


def _refuse_encoder(tensors: Tensors) -> None:
  for key, kind in (
    ('norms_block.0.weight', 'V-JEPA 2.1'),
    ('patch_embed_img.proj.weight', 'V-JEPA 2.1'),
    ('blocks.0.mlp.fc3.weight', 'with SwiGLU perceptrons'),
  ):
    if key in tensors:
      raise WeightsError(
        f'{tensors.name} is one {kind}, which is not supported (it has {key})'
      )


def _check_heads(tensors: Tensors, width: int, num_heads: int) -> None:
  if width % num_heads:
    raise WeightsError(
      f'{tensors.name} is {width} wide, not divisible by {num_heads} heads'
    )


def convert_encoder_tensors(tensors: Tensors, num_heads: int) -> Params:
  """Converts an encoder, see `convert_encoder`."""
  _refuse_encoder(tensors)
  kernel = tensors.take('patch_embed.proj.weight', None, 3, None, None, None)
  width = kernel.shape[0]
  return {
    'embed': {
      'proj': {
        # [D, 3, t, p, p] -> [t * p * p * 3, D]
        'kernel': kernel.transpose(2, 3, 4, 1, 0).reshape(-1, width),
        'bias': tensors.take('patch_embed.proj.bias', width),
      }
    },
    'transformer': _convert_blocks(tensors, 'blocks', width, num_heads),
    'norm': _convert_norm(tensors, 'norm', width),
  }


def convert_predictor_tensors(
  tensors: Tensors, num_heads: int, out_width: int | None = None
) -> Params:
  """Converts a predictor; checks the encoder's width if it is given."""
  if 'action_encoder.weight' in tensors:
    refuse_action_conditioned({'action_encoder.weight': None})
  if 'predictor_proj_context.weight' in tensors:
    raise WeightsError(
      f'{tensors.name} is one of V-JEPA 2.1, which is not supported (it has '
      'predictor_proj_context.weight)'
    )
  embed = tensors.take('predictor_embed.weight', None, out_width)
  width, out_width = embed.shape
  tokens = []
  while f'mask_tokens.{len(tokens)}' in tensors or not tokens:
    tokens.append(tensors.take(f'mask_tokens.{len(tokens)}', 1, 1, width))
  return {
    'embed': _convert_linear(tensors, 'predictor_embed', out_width, width),
    'mask_tokens': np.concatenate(tokens).reshape(-1, width),
    'transformer': _convert_blocks(
      tensors, 'predictor_blocks', width, num_heads, 4 * width
    ),
    'norm': _convert_norm(tensors, 'predictor_norm', width),
    'proj': _convert_linear(tensors, 'predictor_proj', width, out_width),
  }


def convert_probe_tensors(tensors: Tensors, num_heads: int) -> Params:
  """Converts a probe, see `convert_probe`."""
  for key in ('verb_classifier.weight', 'action_classifier.weight'):
    if key in tensors:
      raise WeightsError(
        f'{tensors.name} anticipates actions ({key}), which is not supported'
      )
  query = tensors.take('pooler.query_tokens', 1, 1, None)
  width = query.shape[-1]
  _check_heads(tensors, width, num_heads)
  prefix = 'pooler.cross_attention_block'
  # Rows are keys, then values.
  kernel = tensors.take(f'{prefix}.xattn.kv.weight', 2 * width, width)
  bias = tensors.take(f'{prefix}.xattn.kv.bias', 2 * width)
  num_classes = tensors.take('linear.bias', None).shape[0]
  params = {
    'query': query,
    'norm1': _convert_norm(tensors, f'{prefix}.norm1', width),
    'query_proj': _convert_linear(tensors, f'{prefix}.xattn.q', width, width),
    'key_proj': {'kernel': kernel[:width].T, 'bias': bias[:width]},
    'value_proj': {'kernel': kernel[width:].T, 'bias': bias[width:]},
    'norm2': _convert_norm(tensors, f'{prefix}.norm2', width),
    'mlp': _convert_mlp(tensors, f'{prefix}.mlp', width, 4 * width),
    'classifier': _convert_linear(tensors, 'linear', width, num_classes),
  }
  if f'{prefix}.xattn.proj.weight' in tensors:
    params['out_proj'] = _convert_linear(
      tensors, f'{prefix}.xattn.proj', width, width
    )
  if 'pooler.blocks.0.norm1.weight' in tensors:
    if 'out_proj' in params:
      # There they come after the query, which no released probe has.
      raise WeightsError(
        f'{tensors.name} is one of V-JEPA 1 with self-attention blocks, which '
        'is not supported'
      )
    for i in range(tensors.count_blocks('pooler.blocks')):
      params[f'block_{i}'] = _convert_block(
        tensors, f'pooler.blocks.{i}', width, num_heads, 4 * width
      )
    tensors.check_all_taken('pooler.blocks')
  return params


def _convert_blocks(
  tensors: Tensors,
  prefix: str,
  width: int,
  num_heads: int,
  mlp_dim: int | None = None,
) -> Params:
  """Stacks the blocks over depth, as the scan of `Transformer` wants them."""
  _check_heads(tensors, width, num_heads)
  blocks = [
    _convert_block(tensors, f'{prefix}.{i}', width, num_heads, mlp_dim)
    for i in range(tensors.count_blocks(prefix))
  ]
  tensors.check_all_taken(prefix)
  return {'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks)}


def _convert_block(
  tensors: Tensors,
  prefix: str,
  width: int,
  num_heads: int,
  mlp_dim: int | None,
) -> Params:
  heads = (num_heads, width // num_heads)
  kernel = tensors.take(f'{prefix}.attn.qkv.weight', 3 * width, width)
  kernel = kernel.reshape(3, *heads, width).transpose(0, 3, 1, 2)
  bias = tensors.take(f'{prefix}.attn.qkv.bias', 3 * width).reshape(3, *heads)
  out = tensors.take(f'{prefix}.attn.proj.weight', width, width)
  return {
    'norm1': _convert_norm(tensors, f'{prefix}.norm1', width),
    'attention': {
      **{
        name: {'kernel': kernel[i], 'bias': bias[i]}
        for i, name in enumerate(('query', 'key', 'value'))
      },
      'out_kernel': out.T.reshape(*heads, width),
      'out_bias': tensors.take(f'{prefix}.attn.proj.bias', width),
    },
    'norm2': _convert_norm(tensors, f'{prefix}.norm2', width),
    'mlp': _convert_mlp(tensors, f'{prefix}.mlp', width, mlp_dim),
  }


def _convert_mlp(
  tensors: Tensors, prefix: str, width: int, hidden: int | None
) -> Params:
  hidden = tensors.take(f'{prefix}.fc1.bias', hidden).shape[0]
  return {
    'fc1': _convert_linear(tensors, f'{prefix}.fc1', width, hidden),
    'fc2': _convert_linear(tensors, f'{prefix}.fc2', hidden, width),
  }


def _convert_norm(tensors: Tensors, prefix: str, width: int) -> Params:
  return {
    'scale': tensors.take(f'{prefix}.weight', width),
    'bias': tensors.take(f'{prefix}.bias', width),
  }


def _convert_linear(
  tensors: Tensors, prefix: str, inputs: int, outputs: int
) -> Params:
  return {
    'kernel': tensors.take(f'{prefix}.weight', outputs, inputs).T,
    'bias': tensors.take(f'{prefix}.bias', outputs),
  }


def _export_blocks(params: Params, prefix: str) -> dict[str, np.ndarray]:
  blocks = params['transformer']['blocks']
  state = {}
  for i in range(blocks['norm1']['scale'].shape[0]):
    block = jax.tree.map(lambda x, i=i: x[i], blocks)
    name, attention = f'{prefix}.{i}', block['attention']
    qkv = [attention[part] for part in ('query', 'key', 'value')]
    width = attention['out_bias'].shape[0]
    out = attention['out_kernel'].reshape(width, width)
    state |= {
      **_export_norm(block['norm1'], f'{name}.norm1'),
      f'{name}.attn.qkv.weight': np.ascontiguousarray(
        np.concatenate([x['kernel'].reshape(width, width).T for x in qkv])
      ),
      f'{name}.attn.qkv.bias': np.concatenate(
        [x['bias'].reshape(width) for x in qkv]
      ),
      f'{name}.attn.proj.weight': np.ascontiguousarray(out.T),
      f'{name}.attn.proj.bias': attention['out_bias'],
      **_export_norm(block['norm2'], f'{name}.norm2'),
      **_export_linear(block['mlp']['fc1'], f'{name}.mlp.fc1'),
      **_export_linear(block['mlp']['fc2'], f'{name}.mlp.fc2'),
    }
  return state


def _export_norm(params: Params, prefix: str) -> dict[str, np.ndarray]:
  return {f'{prefix}.weight': params['scale'], f'{prefix}.bias': params['bias']}


def _export_linear(params: Params, prefix: str) -> dict[str, np.ndarray]:
  return {
    f'{prefix}.weight': np.ascontiguousarray(params['kernel'].T),
    f'{prefix}.bias': params['bias'],
  }
