"""Official PyTorch checkpoints of V-JEPA 1, 2 and 2.1."""

from collections.abc import Mapping
import os
import re
from typing import Any
import zipfile

from absl import logging
import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.interop import layout, names
from vjepa_jax.interop.layout import State, Tensors, Weights, WeightsError
from vjepa_jax.interop.names import Family
from vjepa_jax.models import zoo
from vjepa_jax.models.action_predictor import ActionPredictor

ENCODERS = ('target_encoder', 'ema_encoder', 'encoder')
# Where the places of tokens are stretched to those of 256 pixels.
_POSITIONS_21 = 'rope_rescaled', 'rope_interleaved'
# Mask tokens that the code builds a predictor with; the first one is trained.
_NUM_MASK_TOKENS, _NUM_MASK_TOKENS_21 = 10, 8
_PREDICTOR_HEADS = 12  # of V-JEPA 2 and 2.1


def read_checkpoint(
  path: str | os.PathLike,
  which: str = 'target_encoder',
  *,
  positions: str | None = None,
  predictor_positions: str | None = None,
  num_heads: int | None = None,
  predictor_heads: int | None = None,
  with_predictor: bool = True,
) -> Weights:
  """Reads all of an official `.pth.tar` or `.pt` file, running no code in it.

  Args:
    path: A pretraining checkpoint, or one of probes.
    which: 'target_encoder' (the EMA), 'ema_encoder' (the same, distilled) or
      'encoder'. Without a target encoder the next one that is there is taken.
    positions: Positions of the encoder, see `Encoder`; of V-JEPA 2.1
      'rope_rescaled'. Of the others no tensor tells; None takes 'rope_tiled'
      (V-JEPA 2) if the file has no table of positions, more than two mask
      tokens, or the giant's width, and 'sincos' (V-JEPA 1) otherwise, and logs
      which.
    predictor_positions: Of the predictor; None for those of the encoder. So
      2.1 was trained; torch.hub builds its predictor with 'rope_interleaved',
      which is another one on any grid but 16 x 16.
    num_heads: Attention heads of the encoder, or of probes; None for those of
      the named size.
    predictor_heads: None for 12 with RoPE, and otherwise for as many as the
      encoder has.
    with_predictor: Read the predictor too.

  Raises:
    WeightsError: It cannot be read, or its model is not supported.
  """
  content = _read_file(path)
  try:
    probes, used = _read_probes(content, num_heads)
    name = _choose_encoder(content, which, required=not probes)
    models = {'probes': probes}
    if name is not None:
      state = _strip(content[name] if name else content)
      predictor_state = _strip(content.get('predictor') or {})
      used.append(tensors := Tensors(state, name or 'encoder'))
      encoder_table, predictor_table, told = _choose_tables(
        tensors, predictor_state
      )
      positions = positions or _tell_positions(path, state, predictor_state)
      # V-JEPA 1 had it not, which matters for parameters made anew.
      scaled = positions != 'sincos'
      fields = {'positions': positions, 'scale_init_by_depth': scaled}
      num_heads = num_heads or _find_heads(tensors)
      encoder, models['encoder_params'] = layout.read(
        encoder_table, tensors, fields=fields | told, num_heads=num_heads
      )
      models['encoder'] = encoder
      _check_levels(path, encoder.levels, models['encoder_params'], positions)
      if positions == 'sincos' and 'pos_embed' in state:
        models |= _tell_clips(state['pos_embed'], encoder.tubelet)
      if with_predictor and predictor_state:
        used.append(Tensors(predictor_state, 'predictor'))
        heads = num_heads if positions == 'sincos' else _PREDICTOR_HEADS
        if predictor_table is names.ACTION_PREDICTOR:
          heads, models['one_step'] = 16, content.get('one_step', True)
        fields['positions'] = predictor_positions or positions
        models['predictor'], models['predictor_params'] = layout.read(
          predictor_table,
          used[-1],
          fields=fields | _tell_predictor(encoder.levels, predictor_state),
          num_heads=predictor_heads or heads,
          **({} if told else {'out_width': encoder.width}),
        )
        if models.get('one_step') is not None and used[-1].list_unused():
          raise WeightsError(
            f'predictor has tensors without a place: {used[-1].list_unused()}'
          )
  except WeightsError as error:
    raise WeightsError(f'{path}: {error}') from None
  unused = tuple(f'{x.name}/{key}' for x in used for key in x.list_unused())
  if unused:
    logging.info('%s: not used: %s', path, ', '.join(unused))
  return Weights(**models, unused=unused)


def write_checkpoint(path: str | os.PathLike, weights: Weights) -> None:
  """Writes a file that the code of V-JEPA 2 or 2.1 loads, strictly.

  The encoder is stored once, under all names that the code looks for. What the
  code has beside is filled up with zeros: mask tokens, a camera's encoder.

  Raises:
    WeightsError: There is no torch, or the code has no such model.
  """
  torch = _import_torch(path)
  encoder, predictor = weights.encoder, weights.predictor
  is_21 = bool(encoder.levels)
  positions = _POSITIONS_21 if is_21 else ('rope_tiled',)
  for name, model in (('encoder', encoder), ('predictor', predictor)):
    if model is not None and model.positions not in positions:
      raise WeightsError(
        f'the {name} has positions {model.positions!r}; the official code of '
        f'{"V-JEPA 2.1" if is_21 else "V-JEPA 2"} has {" and ".join(positions)}'
      )
  if is_21 and encoder.levels != zoo.LEVELS.get(encoder.depth):
    raise WeightsError(
      f'the levels {encoder.levels} of {encoder.depth} blocks are not those of '
      f'the official code, {zoo.LEVELS.get(encoder.depth)}'
    )
  if encoder.pixel_norm != 'imagenet':
    raise WeightsError(
      f'the encoder normalises pixels by {encoder.pixel_norm!r}; the official '
      "code does by 'imagenet' only"
    )
  tables = names.ENCODER, names.PREDICTOR
  if is_21:
    fused = predictor is not None and predictor.levels > 1
    tables = (
      names.make_encoder_21(encoder.levels),
      names.make_predictor_21(fused),
    )
  tensors = layout.export(
    tables[0], weights.encoder_params, tubelet=encoder.tubelet
  )
  content = dict.fromkeys(ENCODERS, tensors)
  if isinstance(predictor, ActionPredictor):
    params = _fill_extrinsics(weights)
    content['predictor'] = layout.export(names.ACTION_PREDICTOR, params)
  elif predictor is not None:
    params = dict(weights.predictor_params)
    count = _NUM_MASK_TOKENS_21 if is_21 else _NUM_MASK_TOKENS
    missing = count - len(params['mask_tokens'])
    if missing < 0:
      raise WeightsError(
        f'the predictor has {count - missing} mask tokens; the official code '
        f'has {count}'
      )
    if predictor.num_heads != _PREDICTOR_HEADS:
      logging.warning(
        'the predictor has %d heads, which no file says: the official code '
        'builds it with %d',
        predictor.num_heads,
        _PREDICTOR_HEADS,
      )
    params['mask_tokens'] = np.pad(
      params['mask_tokens'], [(0, missing), (0, 0)]
    )
    content['predictor'] = layout.export(tables[1], params)
  # The same tensor, which is written once.
  converted = {
    id(state): {
      f'module.backbone.{key}': torch.from_numpy(value)
      for key, value in state.items()
    }
    for state in content.values()
  }
  saved = {k: converted[id(x)] for k, x in content.items()}
  if isinstance(predictor, ActionPredictor):
    saved['one_step'] = weights.one_step
  with storage.replacing(path) as temporary:
    torch.save(saved, temporary)


def _fill_extrinsics(weights: Weights) -> layout.Params:
  """Adds the camera's encoder, which the code always has, where it is not."""
  model, params = weights.predictor, weights.predictor_params
  sizes = model.action_dim, model.state_dim, model.extrinsics_dim
  if sizes not in ((7, 7, 0), (7, 7, 6)):
    raise WeightsError(
      f'actions, states, extrinsics have {sizes} numbers; the official code '
      'has (7, 7, 6): give --format=jax'
    )
  shapes = {'kernel': (6, model.width), 'bias': (model.width,)}
  zeros = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
  return {'extrinsics_encoder': zeros, **params}


def _import_torch(path: str | os.PathLike) -> Any:
  try:
    import torch
  except ImportError:
    raise WeightsError(
      f"{path} is of PyTorch, which is missing: pip install -e '.[parity]'"
    ) from None
  return torch


def _read_file(path: str | os.PathLike) -> Mapping[str, Any]:
  """Loads tensors and plain values of a file written by `torch.save`."""
  torch = _import_torch(path)
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise WeightsError(f'there is no file {path}')
  try:
    # Mapping leaves the optimizer's moments on the disk.
    mapped = zipfile.is_zipfile(path)
    content = torch.load(
      path, map_location='cpu', weights_only=True, mmap=mapped
    )
  except Exception as error:  # torch raises seven kinds for damaged files
    blocked = re.search(r'GLOBAL (\S+)', str(error))
    if blocked:
      raise WeightsError(
        f'{path} is refused: loading it would run code, {blocked[1]}'
      ) from None
    detail = (str(error).splitlines() or [''])[0][:100]
    raise WeightsError(
      f'{path} is truncated or no PyTorch checkpoint '
      f'({type(error).__name__}: {detail})'
    ) from None
  if not isinstance(content, Mapping):
    kind = type(content).__name__
    raise WeightsError(f'{path} holds a {kind}, not a checkpoint')
  return content


def _strip(state: Any) -> dict[str, np.ndarray]:
  """Drops the prefixes of wrappers, and everything that is no tensor."""
  if not isinstance(state, Mapping):
    raise WeightsError(f'a {type(state).__name__} is where tensors should be')
  wrapper = re.compile(r'^(module\.)?(backbone\.)?')
  return {
    wrapper.sub('', key): value.detach().float().numpy()
    for key, value in state.items()
    if hasattr(value, 'detach')
  }


def _choose_encoder(
  content: Mapping[str, Any], which: str, required: bool
) -> str | None:
  """Names the item to read; '' if the file is itself an encoder."""
  if which not in ENCODERS:
    raise WeightsError(f'{which!r} is not one of {ENCODERS}')
  if which in content:
    return which
  candidates = [name for name in ENCODERS if name in content]
  if candidates and which == 'target_encoder':
    logging.info('no target_encoder in the file: taking %s', candidates[0])
    return candidates[0]
  if any(str(key).endswith('patch_embed.proj.weight') for key in content):
    return ''
  if not required:
    return None
  raise WeightsError(f'it has no {which}, only {sorted(map(str, content))[:8]}')


def _choose_tables(
  tensors: Tensors, predictor: State
) -> tuple[Family, Family, dict[str, Any]]:
  """Chooses the tables of names, and the encoder's fields of V-JEPA 2.1."""
  if 'action_encoder.weight' in predictor:
    return names.ENCODER, names.ACTION_PREDICTOR, {}
  if 'norms_block.0.weight' not in tensors:
    return names.ENCODER, names.PREDICTOR, {}
  depth = tensors.count('blocks.{i}.')
  levels = zoo.LEVELS.get(depth)
  if levels is None:
    raise WeightsError(
      f'V-JEPA 2.1 has no encoder of {depth} blocks, only of {[*zoo.LEVELS]}'
    )
  fused = 'predictor_embed.0.weight' in predictor
  return (
    names.make_encoder_21(levels),
    names.make_predictor_21(fused),
    {'levels': levels, 'modalities': True},
  )


def _tell_predictor(
  levels: tuple[int, ...], predictor: State
) -> dict[str, Any]:
  """Returns the predictor's fields of V-JEPA 2.1."""
  if not levels:
    return {}
  count = len(levels) if 'predictor_embed.0.weight' in predictor else 1
  return {'levels': count, 'modalities': True, 'predict_context': True}


def _check_levels(
  path: str | os.PathLike,
  levels: tuple[int, ...],
  params: layout.Params,
  positions: str,
) -> None:
  """Refuses positions that V-JEPA 2.1 has not; names untrained levels."""
  if not levels:
    return
  if positions not in _POSITIONS_21:
    raise WeightsError(
      f'it is of V-JEPA 2.1, whose positions are one of {_POSITIONS_21}, not '
      f'{positions!r}'
    )
  untrained = [
    level
    for level in levels[:-1]
    if (params[f'norm_{level}']['scale'] == 1).all()
    and not params[f'norm_{level}']['bias'].any()
  ]
  if untrained:
    logging.info(
      '%s: the norms of levels %s were never trained, as in distilled models: '
      'their features are the plain outputs of blocks, normalised',
      path,
      ', '.join(map(str, untrained)),
    )


def _find_heads(tensors: Tensors) -> int:
  """Looks up the heads of the named size that is as wide and as deep."""
  width = tensors.take('patch_embed.proj.bias', None).shape[0]
  depth = tensors.count('blocks.{i}.')
  for size in zoo.SIZES.values():
    if (size.width, size.depth) == (width, depth):
      return size.num_heads
  raise WeightsError(
    f'no named size is {width} wide and {depth} deep: give its number of '
    'attention heads (num_heads)'
  )


def _tell_positions(
  path: str | os.PathLike, state: State, predictor: State
) -> str:
  """Tells the encoder's positions, or guesses and logs them."""
  if 'norms_block.0.weight' in state:
    return 'rope_rescaled'
  num_tokens = sum(key.startswith('mask_tokens.') for key in predictor)
  width = len(state.get('norm.weight', ()))
  positions = 'rope_tiled'
  if 'pos_embed' not in state:
    reason = 'it has no table of positions'
  elif num_tokens > 2:
    reason = f'it has {num_tokens} mask tokens'
  elif width == zoo.SIZES['giant'].width:
    reason = 'V-JEPA 1 has no giant'
  else:
    positions, reason = 'sincos', 'it has a table of positions'
  message = '%s: positions %r, because %s; change it by positions='
  logging.info(message, path, positions, reason)
  return positions


def _tell_clips(
  table: np.ndarray, tubelet: tuple[int, int, int]
) -> dict[str, int]:
  """Tells the clips of V-JEPA 1 from its table of positions."""
  # Every released model takes 16 frames.
  time, patch, _ = tubelet
  side = round((table.shape[1] * time / 16) ** 0.5)
  return {'resolution': side * patch, 'frames': 16}


def _read_probes(
  content: Mapping[str, Any], num_heads: int | None
) -> tuple[tuple[Any, ...], list[Tensors]]:
  """Reads `classifier` (V-JEPA 1) or the list `classifiers` (V-JEPA 2).

  Returns:
    Probes with their parameters, and the tensors that they are of.
  """
  states = content.get('classifiers')
  if states is None:
    states = [content['classifier']] if 'classifier' in content else []
  used = [Tensors(_strip(x), f'probe {i}') for i, x in enumerate(states)]
  probes = []
  for tensors in used:
    # All published probes have 16 heads, those on a giant too.
    probe, params = layout.read(names.PROBE, tensors, num_heads=num_heads or 16)
    if probe.output_projection and probe.depth:
      # There they come after the query, which no released probe has.
      raise WeightsError(
        f'{tensors.name} is one of V-JEPA 1 with self-attention blocks, which '
        'is not supported'
      )
    probes.append((probe, params))
  return tuple(probes), used
