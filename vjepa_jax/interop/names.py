"""What published models call their tensors: one table a family, both ways.

A row is one tensor: its place in our parameters, its names in official files of
V-JEPA 1 and 2 and in Hugging Face folders, its shape there, and how it is
rearranged. Of a name, `{i}` counts blocks or tokens, and `[1/3]` is the second
third of the tensor's rows. Words in shapes are sizes, which the first tensor
that has one decides; most are also fields of the module.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import linen as nn
import numpy as np

from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.probe import AttentiveProbe

Sizes = dict[str, int]
_Rearrange = Callable[[np.ndarray, Sizes], np.ndarray]


class Transform(NamedTuple):
  """How a tensor is rearranged; nothing is computed, so both ways are exact."""

  load: _Rearrange
  export: _Rearrange


COPY = Transform(lambda x, _: x, lambda x, _: x)
# [out, in] <-> [in, out]
TRANSPOSE = Transform(lambda x, _: x.T, lambda x, _: x.T)
# [heads * D, in] <-> [in, heads, D]; a bias [heads * D] <-> [heads, D]
SPLIT_HEADS = Transform(
  lambda x, sizes: x.T.reshape(*x.shape[1:], sizes['num_heads'], -1),
  lambda x, _: x.reshape(*x.shape[:-2], -1).T,
)
# [out, heads * D] <-> [heads, D, out]
JOIN_HEADS = Transform(
  lambda x, sizes: x.T.reshape(sizes['num_heads'], -1, x.shape[0]),
  lambda x, _: x.reshape(-1, x.shape[-1]).T,
)
# The kernel of a convolution [D, 3, t, h, w] <-> [t * h * w * 3, D]
FLATTEN_TUBELET = Transform(
  lambda x, _: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
  lambda x, sizes: x.reshape(
    sizes['t'], sizes['h'], sizes['w'], 3, -1
  ).transpose(4, 3, 0, 1, 2),
)
_FLATTEN_IMAGE = Transform(
  FLATTEN_TUBELET.load,
  lambda x, sizes: FLATTEN_TUBELET.export(x, sizes | {'t': 1}),
)
# [1, 1, D] <-> [D]
SQUEEZE = Transform(lambda x, _: x[0, 0], lambda x, _: x[None, None])


class Row(NamedTuple):
  """One tensor, or the same one of all blocks."""

  ours: str  # path in our parameters, joined by dots
  official: str
  huggingface: str  # '' if they have none
  shape: tuple[str | int, ...]  # there, of one block
  transform: Transform = COPY
  # The size that says how many there are, '' of a single one. Without an `{i}`
  # in the name they are stacked on the first axis.
  count: str = ''
  optional: str = ''  # the field that says whether there is one, '' if always


class Family(NamedTuple):
  """A kind of model."""

  module: type[nn.Module]
  rows: tuple[Row, ...]
  refused: dict[str, str]  # tensors that tell another kind, and which
  advice: str = ''  # what to do then
  mlp_ratio: int | None = 4  # 'mlp_dim' over 'width', None for any
  strict: bool = False  # no tensors beside these, where there are no old ones


# What a module's weight and bias are called here, and how they are rearranged.
_NORM = ('.scale', COPY), ('.bias', COPY)
_LINEAR = ('.kernel', TRANSPOSE), ('.bias', COPY)
_HEADS = ('.kernel', SPLIT_HEADS), ('.bias', SPLIT_HEADS)
_OUT = ('_kernel', JOIN_HEADS), ('_bias', COPY)
_TUBELETS = ('.kernel', FLATTEN_TUBELET), ('.bias', COPY)
_IMAGES = ('.kernel', _FLATTEN_IMAGE), ('.bias', COPY)

_SQUARE = 'width', 'width'


def _list_rows(
  modules: tuple[tuple[Any, ...], ...], *prefixes: str, **fields: Any
) -> Iterator[Row]:
  """Yields the rows of modules: kind, three names, shape of the weight."""
  for kind, *names, shape in modules:
    paths = [
      name and prefix + name
      for prefix, name in zip(prefixes or ('',) * 3, names, strict=True)
    ]
    for (ending, transform), part in zip(kind, ('weight', 'bias'), strict=True):
      yield Row(
        paths[0] + ending,
        *(path and f'{path}.{part}' for path in paths[1:]),
        shape if part == 'weight' else shape[:1],
        transform,
        **fields,
      )


# fmt: off
_MLP = (
  (_LINEAR, 'mlp.fc1', 'mlp.fc1', 'mlp.fc1', ('mlp_dim', 'width')),
  (_LINEAR, 'mlp.fc2', 'mlp.fc2', 'mlp.fc2', ('width', 'mlp_dim')),
)
_BLOCK = (
  (_NORM, 'norm1', 'norm1', 'norm1', ('width',)),
  (_HEADS, 'attention.query', 'attn.qkv[0/3]', 'attention.query', _SQUARE),
  (_HEADS, 'attention.key', 'attn.qkv[1/3]', 'attention.key', _SQUARE),
  (_HEADS, 'attention.value', 'attn.qkv[2/3]', 'attention.value', _SQUARE),
  (_OUT, 'attention.out', 'attn.proj', 'attention.proj', _SQUARE),
  (_NORM, 'norm2', 'norm2', 'norm2', ('width',)),
  *_MLP,
)
_PROBE_BLOCK = (
  (_NORM, 'norm1', 'norm1', 'layer_norm1', ('width',)),
  (_HEADS, 'attention.query', 'attn.qkv[0/3]', 'self_attn.q_proj', _SQUARE),
  (_HEADS, 'attention.key', 'attn.qkv[1/3]', 'self_attn.k_proj', _SQUARE),
  (_HEADS, 'attention.value', 'attn.qkv[2/3]', 'self_attn.v_proj', _SQUARE),
  (_OUT, 'attention.out', 'attn.proj', 'self_attn.out_proj', _SQUARE),
  (_NORM, 'norm2', 'norm2', 'layer_norm2', ('width',)),
  *_MLP,
)
# One query attends to all tokens, with projections that are not split in heads.
_PROBE_QUERY = (
  (_NORM, 'norm1', 'norm1', 'layer_norm1', ('width',)),
  (_LINEAR, 'query_proj', 'xattn.q', 'cross_attn.q_proj', _SQUARE),
  (_LINEAR, 'key_proj', 'xattn.kv[0/2]', 'cross_attn.k_proj', _SQUARE),
  (_LINEAR, 'value_proj', 'xattn.kv[1/2]', 'cross_attn.v_proj', _SQUARE),
  (_NORM, 'norm2', 'norm2', 'layer_norm2', ('width',)),
  *_MLP,
)

ENCODER = Family(
  Encoder,
  (
    *_list_rows((
      (_TUBELETS, 'embed.proj', 'patch_embed.proj',
       'encoder.embeddings.patch_embeddings.proj',
       ('width', 3, 't', 'h', 'w')),
      (_NORM, 'norm', 'norm', 'encoder.layernorm', ('width',)),
    )),
    *_list_rows(
      _BLOCK, 'transformer.blocks.', 'blocks.{i}.', 'encoder.layer.{i}.',
      count='depth',
    ),
  ),
  refused={
    'patch_embed_img.proj.weight': 'is one of V-JEPA 2.1',
    'blocks.0.mlp.fc3.weight': 'is one with SwiGLU perceptrons',
  },
  mlp_ratio=None,
)

PREDICTOR = Family(
  Predictor,
  (
    *_list_rows((
      (_LINEAR, 'embed', 'predictor_embed',
       'predictor.embeddings.predictor_embeddings', ('width', 'out_width')),
      (_NORM, 'norm', 'predictor_norm', 'predictor.layernorm', ('width',)),
      (_LINEAR, 'proj', 'predictor_proj', 'predictor.proj',
       ('out_width', 'width')),
    )),
    Row(
      'mask_tokens', 'mask_tokens.{i}', 'predictor.embeddings.mask_tokens',
      (1, 1, 'width'), SQUEEZE, count='num_mask_tokens',
    ),
    *_list_rows(
      _BLOCK, 'transformer.blocks.', 'predictor_blocks.{i}.',
      'predictor.layer.{i}.', count='depth',
    ),
  ),
  refused={
    'predictor_proj_context.weight': 'is one of V-JEPA 2.1',
  },
  advice='; with_predictor=False reads the encoder alone',
)

ACTION_PREDICTOR = Family(
  ActionPredictor,
  (
    *_list_rows((
      (_LINEAR, 'embed', 'predictor_embed', '', ('width', 'out_width')),
      (_LINEAR, 'action_encoder', 'action_encoder', '',
       ('width', 'action_dim')),
      (_LINEAR, 'state_encoder', 'state_encoder', '', ('width', 'state_dim')),
      (_NORM, 'norm', 'predictor_norm', '', ('width',)),
      (_LINEAR, 'proj', 'predictor_proj', '', ('out_width', 'width')),
    )),
    *_list_rows(
      ((_LINEAR, 'extrinsics_encoder', 'extrinsics_encoder', '',
        ('width', 'extrinsics_dim')),),
      optional='extrinsics',
    ),
    *_list_rows(
      _BLOCK, 'transformer.blocks.', 'predictor_blocks.{i}.', '', count='depth'
    ),
  ),
  refused={},
)

# V-JEPA 2.1 adds a vector a modality to all tokens.
_MODALITIES = tuple(
  Row(f'modality_{ours}', f'{theirs}_mod_embed', '', (1, 1, 'width'), SQUEEZE)
  for ours, theirs in (('video', 'video'), ('image', 'img'))
)


def make_encoder_21(levels: tuple[int, ...]) -> Family:
  """Makes the table of an encoder of V-JEPA 2.1, of these levels.

  Each level has a LayerNorm, the last of which is the output's.
  """
  norms = [f'norm_{level}' for level in levels[:-1]] + ['norm']
  return Family(
    Encoder,
    (
      *_list_rows((
        (_TUBELETS, 'embed.proj', 'patch_embed.proj', '',
         ('width', 3, 't', 'h', 'w')),
        (_IMAGES, 'embed_image.proj', 'patch_embed_img.proj', '',
         ('width', 3, 1, 'h', 'w')),
        *(
          (_NORM, norm, f'norms_block.{i}', '', ('width',))
          for i, norm in enumerate(norms)
        ),
      )),
      *_MODALITIES,
      *_list_rows(
        _BLOCK, 'transformer.blocks.', 'blocks.{i}.', '', count='depth'
      ),
    ),
    refused={},
    mlp_ratio=None,
    strict=True,
  )


def make_predictor_21(fused: bool) -> Family:
  """Makes the table of a predictor of V-JEPA 2.1.

  Either it fuses all levels of the context, or it is of a distilled model.
  """
  embed = [(_LINEAR, 'embed', 'predictor_embed', '', ('width', 'in_width'))]
  if fused:
    embed = [
      (_LINEAR, 'fuse', 'predictor_embed.0', '', ('fused', 'in_width')),
      (_LINEAR, 'embed', 'predictor_embed.2', '', ('width', 'fused')),
    ]
  return Family(
    Predictor,
    (
      *_list_rows((
        (_NORM, 'norm', 'predictor_norm', '', ('width',)),
        *embed,
        (_LINEAR, 'proj', 'predictor_proj', '', ('out_width', 'width')),
        (_LINEAR, 'proj_context', 'predictor_proj_context', '',
         ('out_width', 'width')),
      )),
      *_MODALITIES,
      Row(
        'mask_tokens', 'mask_tokens.{i}', '', (1, 1, 'width'), SQUEEZE,
        count='num_mask_tokens',
      ),
      *_list_rows(
        _BLOCK, 'transformer.blocks.', 'predictor_blocks.{i}.', '',
        count='depth',
      ),
    ),
    refused={},
    strict=True,
  )


PROBE = Family(
  AttentiveProbe,
  (
    Row('query', *['pooler.query_tokens'] * 2, (1, 1, 'width')),
    *_list_rows(
      _PROBE_QUERY, '', 'pooler.cross_attention_block.',
      'pooler.cross_attention_layer.',
    ),
    *_list_rows(  # of V-JEPA 1
      ((_LINEAR, 'out_proj', 'xattn.proj', '', _SQUARE),),
      '', 'pooler.cross_attention_block.', '', optional='output_projection',
    ),
    *_list_rows(
      _PROBE_BLOCK, 'block_{i}.', 'pooler.blocks.{i}.',
      'pooler.self_attention_layers.{i}.', count='depth',
    ),
    *_list_rows((
      (_LINEAR, 'classifier', 'linear', 'classifier', ('num_classes', 'width')),
    )),
  ),
  refused={
    'verb_classifier.weight': 'anticipates actions',
    'action_classifier.weight': 'anticipates actions',
  },
)
# fmt: on
