"""Where a run starts that goes on from other weights: `config.init_from`."""

from typing import Any

from absl import logging
from etils import epath
import jax

from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.load import describe, read_weights
from vjepa_jax.tasks.backbone import place
from vjepa_jax.tasks.program import Program
from vjepa_jax.training import checkpoint
from vjepa_jax.training.state import TrainState

# What matters for new parameters alone.
_FREE = ('init_std', 'scale_init_by_depth')


def take_over(
  source: str, program: Program, seed: int, average: bool = False
) -> TrainState:
  """Makes the state of a run that goes on from other weights, at step 0.

  Args:
    source: A workdir of training, of which the moments are taken too, or any
      other source that `vjepa_jax.load` takes. Where it has no predictor, that
      starts untrained; of mask tokens the first are taken.
    program: What is run.
    seed: Of what starts untrained.
    average: Take the average of the encoder for the encoder too, without
      moments (V-JEPA 2.1's second stage of distillation).

  Returns:
    The state, without what is frozen.

  Raises:
    UserError: The source cannot be used, or is of another model.
  """
  shardings = program.shardings
  if not average and (epath.Path(source) / 'checkpoints').is_dir():
    state = checkpoint.load_initial(source, program.abstract, shardings)
    if state is not None:
      return state
  online = read_weights(
    source, which='target_encoder' if average else 'encoder'
  )
  found = {'encoder': online.encoder_params}
  if online.predictor is not None and 'predictor' in program.abstract.params:
    count = program.objective.predictor.num_mask_tokens
    tokens = online.predictor_params['mask_tokens'][:count]
    found['predictor'] = online.predictor_params | {'mask_tokens': tokens}
  for name in found:
    have, want = (
      describe(getattr(x, name)) for x in (online, program.objective)
    )
    _check_fields(f'{source} has {name}', have, want)
  init = jax.jit(program.init, out_shardings=shardings.replace(frozen=None))
  state = init(jax.random.key(seed))
  params = {
    name: jax.tree.map(place, tree, shardings.params[name])
    for name, tree in found.items()
  }
  state = state.replace(params=state.params | params)
  if program.objective.averaged == 'encoder':
    averaged = read_weights(source, with_predictor=False).encoder_params
    target = jax.tree.map(place, averaged, shardings.target)
    state = state.replace(target=target)
  untrained = sorted(set(state.params) - set(found))
  logging.info(
    'took over %s of %s%s',
    ' and '.join(found),
    source,
    f'; untrained: {", ".join(untrained)}' if untrained else '',
  )
  return state


def _check_fields(
  found: str, have: dict[str, Any], want: dict[str, Any]
) -> None:
  """Raises WeightsError unless a module computes the same with its weights."""
  for name, value in want.items():
    fits = have[name] == value
    if name == 'num_mask_tokens':
      fits = have[name] >= value
    if not fits and name not in _FREE:
      raise WeightsError(
        f'{found} {name} {have[name]!r}, and this config {value!r}: use the '
        'recipe of its model'
      )
