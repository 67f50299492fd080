"""Models, objectives and batches of the tests, small enough to compile fast."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import zoo
from vjepa_jax.tasks.program import OBJECTIVES
from vjepa_jax.training.objectives.base import Setup
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.state import init_state

GRID, TUBELET = (2, 4, 4), (2, 8, 8)
BATCH = 8
NAMES = ('short', 'long')
TEACHER = zoo.build_encoder('nano', tubelet=TUBELET).clone(
  width=64, positions='rope_interleaved'
)
_OPTIONS = {
  'vjepa': {'target_norm': 'layer', 'target_view': 'clip'},
  'salt': {'teacher': ''},
  'vjepa21': {'teacher': ''},
}


def build(kind='vjepa', seed=0, **options):
  """Builds an objective with the published options but for those given."""
  encoder = zoo.build_encoder('nano', tubelet=TUBELET, remat='full')
  predictor = functools.partial(
    zoo.build_predictor,
    encoder,
    num_heads=2,
    width=24,
    depth=1,
    num_mask_tokens=2,
  )
  setup = Setup(
    encoder, predictor, lambda path: TEACHER, {'video': NAMES}, seed
  )
  function, *others = OBJECTIVES[kind]
  for name in (*others, kind):
    options = _OPTIONS.get(name, {}) | options
  return function(setup, **options)


def init(objective, seed=0):
  """Initialises a state; mask tokens and biases are random too."""

  @jax.jit
  def start(key):
    state = init_state(objective, make_optimizer(), key)
    return state.replace(
      params=jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(key, p.shape), state.params
      )
    )

  return start(jax.random.key(seed))


def make_batch(seed):
  """Makes random clips and masks."""
  rng = np.random.default_rng(seed)
  masks = []
  for context, target in ((8, 16), (4, 20)):
    ids = np.stack([rng.permutation(32) for _ in range(BATCH)]).astype(np.int32)
    context, target, _ = np.split(ids, (context, context + target), axis=1)
    masks.append({'context': np.sort(context), 'target': np.sort(target)})
  video = rng.integers(0, 256, (BATCH, 4, 32, 32, 3), dtype=np.uint8)
  return {'video': {'pixels': video, 'masks': tuple(masks)}}


def init_teacher():
  """Initialises the encoder of another run."""
  pixels = make_batch(0)['video']['pixels']
  return jax.jit(TEACHER.init)(jax.random.key(0), pixels)['params']


def make_schedules(**values):
  """Makes constant schedules."""
  values = {'learning_rate': 1e-3, 'weight_decay': 0.04, 'ema': 0.9} | values
  return {k: lambda _, v=v: jnp.float32(v) for k, v in values.items()}
