"""Official PyTorch checkpoints of V-JEPA 1 and 2."""

from collections.abc import Mapping
import os
import re
from typing import Any
import zipfile

from absl import logging
import numpy as np

from vjepa_jax.interop import layout
from vjepa_jax.interop.layout import Params, State, Weights, WeightsError
from vjepa_jax.models import zoo
from vjepa_jax.models.probe import AttentiveProbe

ENCODERS = ('target_encoder', 'ema_encoder', 'encoder')


def read_checkpoint(
  path: str | os.PathLike,
  which: str = 'target_encoder',
  *,
  positions: str | None = None,
  num_heads: int | None = None,
  predictor_heads: int | None = None,
  with_predictor: bool = True,
) -> Weights:
  """Reads an official `.pth.tar` or `.pt` file, never running code in it.

  Args:
    path: A pretraining checkpoint, or one of probes.
    which: 'target_encoder' (the EMA), 'ema_encoder' or 'encoder'. Where a file
      has no target encoder, the next one that it has is taken.
    positions: Positions of the encoder, see `Encoder`. No tensor tells; None
      takes 'rope_tiled' (V-JEPA 2) if the file has no table of positions, more
      than two mask tokens, or the giant's width, and 'sincos' (V-JEPA 1)
      otherwise, and logs which.
    num_heads: Attention heads of the encoder, or of probes; None for those of
      the named size.
    predictor_heads: None for 12 with RoPE, and otherwise for as many as the
      encoder has.
    with_predictor: Read the predictor too.

  Returns:
    What the file has, float32.

  Raises:
    WeightsError: The file cannot be read or is of a model that is not
      supported.
  """
  content = _read_file(path)
  try:
    probes, unused = _read_probes(content, num_heads)
    name = _choose_encoder(content, which, required=not probes)
    if name is None:
      return _log_unused(path, Weights(probes=probes, unused=tuple(unused)))
    state = _strip(content if name == '' else content[name])
    predictor_state = _strip(content.get('predictor') or {})
    if not with_predictor:
      predictor_state = {}
    layout.refuse_action_conditioned(predictor_state)
    if positions is None:
      positions = _guess_positions(path, state, predictor_state)

    tensors = layout.Tensors(state, name or 'encoder')
    width = tensors.take('patch_embed.proj.bias', None).shape[0]
    num_heads = num_heads or layout.infer_num_heads(
      width, tensors.count_blocks('blocks')
    )
    encoder_params = layout.convert_encoder_tensors(tensors, num_heads)
    unused += tensors.list_unused()
    tubelet = state['patch_embed.proj.weight'].shape[2:]
    encoder = layout.build_encoder(
      encoder_params, num_heads=num_heads, tubelet=tubelet, positions=positions
    )
    predictor = predictor_params = None
    if predictor_state:
      tensors = layout.Tensors(predictor_state, 'predictor')
      heads = predictor_heads or (12 if positions != 'sincos' else num_heads)
      predictor_params = layout.convert_predictor_tensors(tensors, heads, width)
      unused += tensors.list_unused()
      predictor = layout.build_predictor(
        predictor_params, num_heads=heads, positions=positions
      )
  except WeightsError as error:
    raise WeightsError(f'{path}: {error}') from None
  resolution = frames = None
  if positions == 'sincos' and 'pos_embed' in state:
    # Every released V-JEPA 1 model takes 16 frames; the table in a V-JEPA 2
    # file is a stale one.
    frames = 16
    side = round((state['pos_embed'].shape[1] * tubelet[0] / frames) ** 0.5)
    resolution = side * tubelet[1]
  return _log_unused(
    path,
    Weights(
      encoder,
      encoder_params,
      predictor,
      predictor_params,
      probes,
      resolution,
      frames,
      tuple(unused),
    ),
  )


def _read_file(path: str | os.PathLike) -> Mapping[str, Any]:
  """Loads tensors and plain values of a file written by `torch.save`."""
  try:
    import torch
  except ImportError:
    raise WeightsError(
      f"{path} is read by PyTorch, which is missing: pip install -e '.[parity]'"
    ) from None
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise WeightsError(f'there is no file {path}')
  try:
    # Mapping leaves the optimizer's moments on the disk.
    content = torch.load(
      path,
      map_location='cpu',
      weights_only=True,
      mmap=zipfile.is_zipfile(path),
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
    raise WeightsError(
      f'{path} holds a {type(content).__name__}, not a checkpoint'
    )
  return content


def _strip(state: Any) -> dict[str, np.ndarray]:
  """Drops the prefixes of wrappers, and everything that is no tensor."""
  if not isinstance(state, Mapping):
    raise WeightsError(f'a {type(state).__name__} is where tensors should be')
  return {
    re.sub(r'^(module\.)?(backbone\.)?', '', key): (
      value.detach().float().numpy()
    )
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


def _guess_positions(
  path: str | os.PathLike, state: State, predictor: State
) -> str:
  num_tokens = sum(key.startswith('mask_tokens.') for key in predictor)
  width = state['norm.weight'].shape[0] if 'norm.weight' in state else 0
  if 'pos_embed' not in state:
    positions, reason = 'rope_tiled', 'it has no table of positions'
  elif num_tokens > 2:
    positions, reason = 'rope_tiled', f'it has {num_tokens} mask tokens'
  elif width == zoo.SIZES['giant'].width:
    positions, reason = 'rope_tiled', 'V-JEPA 1 has no giant'
  else:
    positions, reason = 'sincos', 'it has a table of positions'
  logging.info(
    '%s: positions %r, because %s; change it by positions=',
    path,
    positions,
    reason,
  )
  return positions


def _read_probes(
  content: Mapping[str, Any], num_heads: int | None
) -> tuple[tuple[tuple[AttentiveProbe, Params], ...], list[str]]:
  """Reads `classifier` (V-JEPA 1) or the list `classifiers` (V-JEPA 2)."""
  states = content.get('classifiers')
  if states is None:
    states = [content['classifier']] if 'classifier' in content else []
  probes, unused = [], []
  for i, state in enumerate(states):
    tensors = layout.Tensors(_strip(state), f'probe {i}')
    # All published probes have 16 heads, those on a giant too.
    heads = num_heads or 16
    params = layout.convert_probe_tensors(tensors, heads)
    probes.append((layout.build_probe(params, num_heads=heads), params))
    unused += tensors.list_unused()
  return tuple(probes), unused


def _log_unused(path: str | os.PathLike, weights: Weights) -> Weights:
  if weights.unused:
    logging.info('%s: not used: %s', path, ', '.join(weights.unused))
  return weights
