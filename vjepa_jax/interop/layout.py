"""Models from the tensors of published ones, and back.

The conversions are pure functions of mappings from name to numpy array, without
the prefixes of wrappers. They go by the tables of `names`, rearrange tensors
and never compute, so that both directions are exact to the bit.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.interop.names import FLATTEN_TUBELET, Family, Row, Sizes
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.probe import AttentiveProbe

Params = dict[str, Any]
State = Mapping[str, np.ndarray]


class WeightsError(UserError):
  """Weights that cannot be used; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Weights:
  """Models and their parameters, as read from one place; None for none."""

  encoder: Encoder | None = None
  encoder_params: Params | None = None
  predictor: Predictor | ActionPredictor | None = None
  predictor_params: Params | None = None
  probes: tuple[tuple[AttentiveProbe, Params], ...] = ()
  resolution: int | None = None  # height and width of the clips in pixels
  frames: int | None = None  # of a clip
  # The predictor is of use one step ahead alone: its rollouts were trained with
  # a faulty loss (the released V-JEPA 2-AC).
  one_step: bool = False
  unused: tuple[str, ...] = ()  # keys of tensors that have no use here


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
    matches = [n in (None, m) for n, m in zip(shape, value.shape, strict=False)]
    if len(value.shape) != len(shape) or not all(matches):
      wanted = ', '.join('any' if n is None else str(n) for n in shape)
      raise WeightsError(
        f'{self.name} is of another model: {key} has shape '
        f'{tuple(value.shape)}, not ({wanted})'
      )
    self._taken.add(key)
    return value

  def count(self, name: str) -> int:
    """Counts blocks by a name with an `{i}`, those of a gap too."""
    pattern = re.compile(re.escape(name).replace(r'\{i\}', r'(\d+)'))
    found = [int(m[1]) for key in self._state if (m := pattern.match(key))]
    return max(found, default=-1) + 1

  def list_unused(self) -> list[str]:
    """Lists the keys that were not taken."""
    return [key for key in self._state if key not in self._taken]


def read(
  family: Family,
  tensors: Tensors,
  system: str = 'official',
  *,
  fields: Mapping[str, Any] | None = None,
  **sizes: int,
) -> tuple[nn.Module, Params]:
  """Converts the tensors of a model, checking names and shapes.

  Args:
    family: The table of their names.
    tensors: The tensors.
    system: Whose names they have, 'official' or 'huggingface'.
    fields: Fields of the module that no tensor tells, positions for one.
    **sizes: 'num_heads', which no shape tells, and others that are known.

  Raises:
    WeightsError: A tensor is missing or of a wrong shape, or the model is of a
      kind that is not supported.
  """
  for key, kind in family.refused.items():
    if key in tensors:
      raise WeightsError(
        f'{tensors.name} {kind}, which is not supported (it has {key})'
        f'{family.advice}'
      )
  params = {}
  for row in family.rows:
    name = getattr(row, system)
    if row.optional:
      sizes[row.optional] = name in tensors
      if name not in tensors:
        continue
    values = _take_all(tensors, row, name, sizes)
    if sizes['width'] % sizes['num_heads']:
      raise WeightsError(
        f'{tensors.name} is {sizes["width"]} wide, not divisible by '
        f'{sizes["num_heads"]} heads'
      )
    if family.mlp_ratio:
      sizes['mlp_dim'] = family.mlp_ratio * sizes['width']
    values = [row.transform.load(value, sizes) for value in values]
    if '{i}' in row.ours:
      params |= {row.ours.format(i=i): x for i, x in enumerate(values)}
    else:
      params[row.ours] = np.stack(values) if row.count else values[0]
  for key in tensors.list_unused():
    # A block with more in it than is known here computes something else.
    if family.strict or re.search(r'(blocks|layers?)\.\d+\.', key):
      raise WeightsError(
        f'{tensors.name} is of another model: {key} has no place in it'
      )
  if 't' in sizes:
    sizes['tubelet'] = tuple(sizes[name] for name in 'thw')
  names = family.module.__dataclass_fields__
  told = {name: value for name, value in sizes.items() if name in names}
  model = family.module(**told, **(fields or {}))
  return model, traverse_util.unflatten_dict(params, sep='.')


def export(
  family: Family,
  params: Params,
  system: str = 'official',
  *,
  tubelet: tuple[int, int, int] = (2, 16, 16),
) -> dict[str, np.ndarray]:
  """Inverts `read`, bit for bit; an encoder needs its tubelet's sides.

  Raises:
    WeightsError: The tubelet is of another size, or the model is of another
      kind: a tensor has no name, or is not there.
  """
  params = jax.tree.map(np.asarray, params)
  params = traverse_util.flatten_dict(params, sep='.')
  sizes = dict(zip('thw', tubelet, strict=True))
  pieces = collections.defaultdict(list)
  for row in family.rows:
    name = getattr(row, system)
    if '{i}' in row.ours:
      paths = [row.ours.format(i=i) for i in range(len(params))]
      values = [params.pop(path) for path in paths if path in params]
    elif row.ours not in params:
      if row.optional:
        continue
      raise WeightsError(f'the model has no {row.ours}, which {name} is')
    else:
      value = params.pop(row.ours)
      values = value if row.count else [value]
    if not name:
      raise WeightsError(f'{system} has no place for {row.ours}')
    wanted = 3 * math.prod(tubelet)
    if row.transform is FLATTEN_TUBELET and len(values[0]) != wanted:
      raise WeightsError(
        f'the encoder embeds {len(values[0])} numbers a tubelet, a tubelet of '
        f'{tuple(tubelet)} has {wanted}'
      )
    values = [row.transform.export(value, sizes) for value in values]
    if row.count and '{i}' not in name:
      values = [np.stack(values)]
    for i, value in enumerate(values):
      pieces[_split_name(name.format(i=i))[0]].append(value)
  if params:
    raise WeightsError(f'{system} has no place for {min(params)}')
  return {
    name: np.ascontiguousarray(np.concatenate(values))
    for name, values in pieces.items()
  }


def _split_name(name: str) -> tuple[str, int, int]:
  """Splits 'attn.qkv[1/3].weight' into 'attn.qkv.weight', 1 and 3."""
  match = re.search(r'\[(\d)/(\d)\]', name)
  if not match:
    return name, 0, 1
  return name.replace(match[0], ''), int(match[1]), int(match[2])


def _take_all(
  tensors: Tensors, row: Row, name: str, sizes: Sizes
) -> Sequence[np.ndarray]:
  """Takes the tensors of a row, and fills in sizes that they decide."""
  if not row.count:
    return [_take(tensors, name, row.shape, sizes)]
  if '{i}' not in name:
    return _take(tensors, name, (row.count, *row.shape), sizes)
  if row.count not in sizes:
    # If there is none, the first is missing; but probes may have no blocks.
    least = 0 if '{i}' in row.ours else 1
    sizes[row.count] = max(tensors.count(name), least)
  return [
    _take(tensors, name.format(i=i), row.shape, sizes)
    for i in range(sizes[row.count])
  ]


def _take(
  tensors: Tensors, name: str, shape: Sequence[str | int], sizes: Sizes
) -> np.ndarray:
  name, part, parts = _split_name(name)
  wanted = [sizes.get(n) if isinstance(n, str) else n for n in shape]
  if parts > 1:
    wanted[0] *= parts
  value = tensors.take(name, *wanted)
  for size, n in zip(shape, value.shape, strict=True):
    if isinstance(size, str):
      sizes.setdefault(size, n)
  return np.split(value, parts)[part]
