"""Twenty steps of training, and the masks, against the published code's.

The torch side is `reference.py`: modules and loop written from the papers.
"""

import math

import jax
import numpy as np
import pytest

from configs import vjepa1, vjepa2
from vjepa_jax.interop import layout, names
from vjepa_jax.masks.fixed_size import MaskSampler
from vjepa_jax.masks.multiblock import MultiBlock
from vjepa_jax.models import zoo
from vjepa_jax.tasks.program import make_schedules
from vjepa_jax.training import step
from vjepa_jax.training.objectives.targets import FeatureTargets
from vjepa_jax.training.objectives.vjepa import VJepa
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.state import TrainState

torch = pytest.importorskip('torch', reason='needs the extra parity')
import reference  # noqa: E402

TUBELET, GRID, STEPS, CLIP_START = (2, 8, 8), (2, 4, 4), 20, 5
# name: (our positions, the reference's, mask tokens, recipe)
MODELS = {
  'V-JEPA 1': ('sincos', 'sincos', 2, vjepa1),
  'V-JEPA 2': ('rope_tiled', 'tiled', 1, vjepa2),
}


def _batches():
  rng = np.random.default_rng(0)
  samplers = [
    MaskSampler(MultiBlock(n, (s, s)), GRID, *counts)
    for n, s, counts in ((8, 0.15, (8, 12)), (2, 0.7, (2, 20)))
  ]
  batches = []
  for _ in range(STEPS):
    masks = []
    for sampler in samplers:
      draws = zip(*[sampler(rng) for _ in range(4)], strict=True)
      masks.append(
        dict(zip(('context', 'target'), map(np.stack, draws), strict=True))
      )
    pixels = rng.integers(0, 256, (4, 4, 32, 32, 3), dtype=np.uint8)
    batches.append({'video': {'pixels': pixels, 'masks': tuple(masks)}})
  return batches


def _published_schedules(name):
  """The papers' curves over 20 steps, warm-up of 4, in float64."""
  total = int(1.25 * STEPS) if name == 'V-JEPA 1' else STEPS

  def cosine(start, end, x):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * x))

  if name == 'V-JEPA 1':
    return {
      'learning_rate': lambda s: (
        2e-4 + (s + 1) / 4 * 4.25e-4
        if s + 1 < 4
        else cosine(6.25e-4, 1e-6, (s + 1 - 4) / (total - 4))
      ),
      'weight_decay': lambda s: cosine(0.04, 0.4, (s + 1) / total),
      'ema': lambda s: 0.998 + 0.002 * s / total,
    }
  return {
    'learning_rate': lambda s: (
      1e-4 + (s + 1) / 4 * 4.25e-4 if s + 1 < 4 else 5.25e-4
    ),
    'weight_decay': lambda s: 0.04,
    'ema': lambda s: 0.99925,
  }


def _to_numpy(module):
  return {k: v.detach().numpy() for k, v in module.state_dict().items()}


def _build(name):
  """Builds both, the reference's modules and ours, with the same weights.

  Returns:
    The torch modules, our modules, and our parameters: encoder and predictor.
  """
  ours, theirs, num_tokens, _ = MODELS[name]
  encoder_t = reference.Encoder(48, 2, 2, TUBELET, GRID, theirs)
  predictor_t = reference.Predictor(48, 24, 2, 2, num_tokens, GRID, theirs)
  for seed, module in enumerate((encoder_t, predictor_t)):
    reference.randomize(module, seed)
  encoder = zoo.build_encoder('nano', tubelet=TUBELET, positions=ours)
  predictor = zoo.build_predictor(
    encoder, num_heads=2, width=24, depth=2, num_mask_tokens=num_tokens
  )
  params = {}
  for name, family, module in (
    ('encoder', names.ENCODER, encoder_t),
    ('predictor', names.PREDICTOR, predictor_t),
  ):
    tensors = layout.Tensors(_to_numpy(module), name)
    params[name] = layout.read(family, tensors, num_heads=2)[1]
  # Copies: torch goes on to change its tensors in place.
  params = jax.tree.map(np.array, params)
  return (encoder_t, predictor_t), (encoder, predictor), params


@pytest.fixture(scope='module', params=MODELS)
def trained(request):
  """Losses and targets of both, from the same weights, clips and masks."""
  name = request.param
  (encoder_t, predictor_t), (encoder, predictor), params = _build(name)
  config = MODELS[name][3].get_config()
  config.total_steps, config.learning_rate.warmup_steps = STEPS, 4
  schedules = make_schedules(config, STEPS, 1.0)
  tx = make_optimizer(**config.optimizer)
  train_step = jax.jit(
    step.make_train_step(
      VJepa(encoder, predictor, FeatureTargets(encoder), ('short', 'long')),
      tx,
      schedules,
      clip_norm=0.05,  # low enough to bite
      clip_start_step=CLIP_START,
    )
  )
  state = TrainState(np.int32(0), params, params['encoder'], tx.init(params))
  losses = []
  for batch in _batches():
    state, metrics = train_step(state, batch)
    losses.append(float(metrics['loss']))
  expected, target = reference.train(
    encoder_t,
    predictor_t,
    _batches(),
    _published_schedules(name),
    0.05,
    CLIP_START,
  )
  exported = layout.export(names.ENCODER, state.target, tubelet=TUBELET)
  return name, losses, expected, exported, _to_numpy(target)


@pytest.mark.parametrize('name', MODELS)
def test_forward_equals_the_reference_in_float64(name, check_parity):
  (encoder_t, predictor_t), (encoder, predictor), params = _build(name)
  batch = _batches()[0]
  video = reference.normalize(batch['video']['pixels']).double()
  label = f'{name} (reference, float64)'
  encoder_t.double(), predictor_t.double()
  for index, mask in enumerate(batch['video']['masks']):
    ids = {k: torch.tensor(v).long() for k, v in mask.items()}
    with torch.no_grad():
      context_t = encoder_t(video, ids['context'])
      predicted_t = predictor_t(context_t, ids['context'], ids['target'], index)
    context = encoder.apply(
      {'params': params['encoder']}, batch['video']['pixels'], mask['context']
    )
    predicted = predictor.apply(
      {'params': params['predictor']},
      context,
      mask['context'],
      mask['target'],
      GRID,
      index,
    )
    check_parity(label, f'encoder, mask {index}', context, context_t)
    check_parity(label, f'predictor, mask {index}', predicted, predicted_t)


def test_losses_of_twenty_steps(trained, note_error):
  name, losses, expected, _, _ = trained
  assert expected[0] - expected[-1] > 0.01  # it learns
  relative = np.abs(np.array(losses) / expected - 1)
  note_error(name, 'loss of the first step, relative', relative[0], 1e-5)
  note_error(name, 'losses of 20 steps, relative', relative.max(), 1e-4)


def test_target_after_twenty_steps(trained, note_error):
  name, _, _, exported, target = trained
  errors = {
    key: np.abs(value - target[key]).max() for key, value in exported.items()
  }
  note_error(name, 'EMA weights after 20 steps', max(errors.values()), 1e-5)


def _sample_published(rng, grid, num_blocks, scale, batch_size):
  """Draws one batch as published: one block size, cut to the shortest.

  Returns:
    Context ids and target ids, each a list of arrays of one length.
  """
  t, height, width = grid
  area = int(height * width * scale)
  aspect = rng.uniform(0.75, 1.5)
  h = min(height, int(round(math.sqrt(area * aspect))))
  w = min(width, int(round(math.sqrt(area / aspect))))
  hidden = []
  while len(hidden) < batch_size:
    mask = np.ones(grid, int)
    for _ in range(num_blocks):
      top = rng.integers(0, height - h + 1)
      left = rng.integers(0, width - w + 1)
      mask[:, top : top + h, left : left + w] = 0
    if mask.any():  # else drawn again, as published
      hidden.append(mask == 0)
  return _cut(hidden)


def _cut(hidden):
  """Cuts ids to the shortest of a batch, as published."""
  contexts = [np.flatnonzero(~x) for x in hidden]
  targets = [np.flatnonzero(x) for x in hidden]
  return tuple(
    [ids[: min(map(len, lists))] for ids in lists]
    for lists in (contexts, targets)
  )


@pytest.mark.parametrize('num_blocks,scale', [(8, 0.15), (2, 0.7)])
def test_masks_follow_the_published_distribution(num_blocks, scale, note_error):
  from scipy import stats

  grid, rng = (8, 14, 14), np.random.default_rng(0)
  frame = grid[1] * grid[2]
  pattern = MultiBlock(num_blocks, (scale, scale))
  published = [
    _sample_published(rng, grid, num_blocks, scale, batch_size=24)
    for _ in range(250)
  ]

  # Our draws, cut as published: batches of 24 with one block size.
  def draw_batch(seed):
    hidden = []
    for clip in range(24):
      positions = np.random.default_rng((seed, 2, clip))
      drawn = np.ones(1)
      while drawn.all():
        sizes = np.random.default_rng((seed, 1))
        drawn = pattern.draw(grid, _Switch(sizes, positions))
      hidden.append(drawn)
    return _cut(hidden)

  ours = [draw_batch(seed) for seed in range(250)]
  name = f'masks {num_blocks} x {scale}'
  for side, label in ((0, 'context'), (1, 'target')):
    counts = [[len(batch[side][0]) for batch in x] for x in (published, ours)]
    times = [
      [np.mean([np.mean(ids // frame) for ids in batch[side]]) for batch in x]
      for x in (published, ours)
    ]
    for quantity, samples in (('kept counts', counts), ('time', times)):
      distance = stats.ks_2samp(*samples).statistic
      # The critical value of 250 against 250 at 0.1 %.
      note_error(name, f'{label} {quantity}, KS distance', distance, 0.174)


class _Switch:
  """A generator whose sizes and positions come from two streams."""

  def __init__(self, sizes, positions):
    self.uniform, self.integers = sizes.uniform, positions.integers
