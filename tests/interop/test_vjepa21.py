"""V-JEPA 2.1 beside a reference in torch: files, features, loss, training."""

import copy
import dataclasses
import functools

from absl import logging
from etils import epath
import jax
import numpy as np
import optax
import pytest

from vjepa_jax.interop import layout, names, pytorch
from vjepa_jax.interop.huggingface import save_pretrained
from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.load import load
from vjepa_jax.models.tubelets import normalize_pixels
from vjepa_jax.models.zoo import LEVELS
from vjepa_jax.tools.convert import write_workdir
from vjepa_jax.training.objectives.base import encode_levels
from vjepa_jax.training.objectives.regions import measure_distance
from vjepa_jax.training.objectives.targets import FeatureTargets
from vjepa_jax.training.objectives.vjepa21 import VJepa21, ramp_weight
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.step import update

torch = pytest.importorskip('torch', reason='the extra parity has torch')
from tests.interop import reference21  # noqa: E402

_TUBELET = (2, 8, 8)
_LEVELS = LEVELS[12]
_SHAPES = {'video': (2, 16, 32, 48, 3), 'image': (3, 1, 40, 24, 3)}
_GRIDS = {'video': (8, 4, 6), 'image': (1, 5, 3)}
_ROWS = {'video': 'video 16 f, 4 x 6', 'image': 'image, 5 x 3'}
_WEIGHTS = {'video': 0.5, 'image': 0.7}
_SHARE = 0.4


@pytest.fixture(scope='module')
def reference(randomize):
  """Encoder, predictor of all levels, and predictor of a distilled model."""
  encoder = reference21.Encoder(48, 12, 2, _TUBELET, _LEVELS)
  make = functools.partial(
    reference21.Predictor, 48, width=24, depth=2, heads=2, num_tokens=8
  )
  predictors = make(levels=4, out=4 * 48), make(levels=1, out=56)
  return [randomize(m, i) for i, m in enumerate((encoder, *predictors))]


@pytest.fixture(scope='module')
def read(reference, tmp_path_factory):
  """Reads a file with the reference and one of its predictors."""
  folder = tmp_path_factory.mktemp('files')

  def write_and_read(
    predictor, key='target_encoder', encoder=reference[0], **options
  ):
    modules = {key: encoder, 'predictor': reference[predictor]}
    content = {
      name: {
        f'module.backbone.{k}': value
        for k, value in module.state_dict().items()
      }
      for name, module in modules.items()
    }
    path = folder / f'{predictor}.pt'
    torch.save(content, path)
    return pytorch.read_checkpoint(
      path, num_heads=2, predictor_heads=2, **options
    )

  return write_and_read


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  streams = {}
  for name, shape in _SHAPES.items():
    tokens = int(np.prod(_GRIDS[name]))
    masks = []
    for context in (tokens // 4, tokens // 6)[: 2 if name == 'video' else 1]:
      ids = [rng.permutation(tokens) for _ in range(shape[0])]
      ids = np.stack(ids).astype(np.int32)[:, : tokens - 2]
      context, target = np.split(ids, [context], axis=1)
      masks.append({'context': context, 'target': target})
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    streams[name] = {'pixels': pixels, 'masks': tuple(masks)}
  return streams


@pytest.fixture(scope='module')
def objective(read):
  """The objective on the models of the file, and their parameters."""
  weights = read(1)
  predictor_params = dict(weights.predictor_params)
  # All masks share the first token.
  predictor_params['mask_tokens'] = predictor_params['mask_tokens'][:1]
  goal = VJepa21(
    weights.encoder,
    weights.predictor.clone(num_mask_tokens=1),
    FeatureTargets(weights.encoder, levels=_LEVELS),
    ('short', 'long'),
    context_weight=_WEIGHTS['video'],
    image_context_weight=_WEIGHTS['image'],
    image_share=_SHARE,
  )
  params = {'encoder': weights.encoder_params, 'predictor': predictor_params}
  return goal, jax.tree.map(jax.numpy.asarray, params)


def test_files_come_back_bit_for_bit(reference, read, tmp_path):
  """What is written loads as torch.hub loads it: strictly, by its key."""
  for which, key in ((1, 'target_encoder'), (2, 'ema_encoder')):
    weights = read(which, key)
    assert not weights.unused
    assert weights.encoder.levels == _LEVELS and weights.encoder.modalities
    assert weights.predictor.levels == (4 if which == 1 else 1)
    assert weights.predictor.num_mask_tokens == 8
    path = tmp_path / f'{which}.pt'
    pytorch.write_checkpoint(path, weights)
    content = torch.load(path, weights_only=True)
    for name, module in ((key, reference[0]), ('predictor', reference[which])):
      state = {k.removeprefix('module.backbone.'): v
               for k, v in content[name].items()}  # fmt: skip
      expected = module.state_dict()
      copy.deepcopy(module).load_state_dict(state, strict=True)
      for k, value in expected.items():
        np.testing.assert_array_equal(state[k], value, k)
    # The encoder is there once, under three names.
    sizes = [p.nbytes for m in (reference[0], reference[which])
             for p in m.state_dict().values()]  # fmt: skip
    assert path.stat().st_size < 1.5 * sum(sizes)


def test_a_file_is_filled_up_with_mask_tokens(read, tmp_path):
  weights = read(1)
  tokens = weights.predictor_params['mask_tokens']
  params = weights.predictor_params | {'mask_tokens': tokens[:1]}
  few = dataclasses.replace(weights, predictor_params=params)
  pytorch.write_checkpoint(tmp_path / 'few.pt', few)
  back = pytorch.read_checkpoint(
    tmp_path / 'few.pt', num_heads=2, predictor_heads=2
  )
  found = back.predictor_params['mask_tokens']
  np.testing.assert_array_equal(found[0], tokens[0])
  assert found.shape == tokens.shape and not found[1:].any()


def test_files_that_are_refused(reference, read, tmp_path):
  state = {k: v.numpy() for k, v in reference[0].state_dict().items()}
  with pytest.raises(WeightsError, match='is one of V-JEPA 2.1'):
    layout.read(names.ENCODER, layout.Tensors(state, 'it'), num_heads=2)
  table = names.make_encoder_21(_LEVELS)
  tensors = layout.Tensors(state | {'pos_embed': np.zeros(1)}, 'it')
  with pytest.raises(WeightsError, match='pos_embed has no place in it'):
    layout.read(table, tensors, num_heads=2)
  with pytest.raises(WeightsError, match="not 'rope_tiled'"):
    read(1, positions='rope_tiled')
  weights = read(1)
  for changes, message in (
    ({'pixel_norm': 'clip'}, 'normalises pixels by'),
    ({'positions': 'sincos'}, "has positions 'sincos'"),
    ({'levels': ()}, "has positions 'rope_rescaled'"),
    ({'levels': (0, 5, 8, 11)}, 'are not those of the official code'),
  ):
    other = dataclasses.replace(
      weights, encoder=weights.encoder.clone(**changes)
    )
    with pytest.raises(WeightsError, match=message):
      pytorch.write_checkpoint(tmp_path / 'x.pt', other)
  params = dict(weights.encoder_params)
  with pytest.raises(WeightsError, match='official has no place for extra'):
    layout.export(table, params | {'extra': np.zeros(1)}, tubelet=_TUBELET)
  del params['modality_image']
  with pytest.raises(WeightsError, match='no modality_image, which img_mod'):
    layout.export(table, params, tubelet=_TUBELET)


def test_untrained_levels_are_named(reference, read, caplog):
  distilled = copy.deepcopy(reference[0])
  for norm in distilled.norms_block[:3]:
    norm.reset_parameters()
  logging.get_absl_logger().propagate = True
  with caplog.at_level('INFO', logger='absl'):
    weights = read(2, 'ema_encoder', encoder=distilled)
    assert 'norms of levels 2, 5, 8 were never trained' in caplog.text
    assert (weights.encoder_params['norm_2']['scale'] == 1).all()
    caplog.clear()
    read(2, 'ema_encoder')
  assert 'never trained' not in caplog.text


def test_a_converted_file_encodes_clips_and_images(
  reference, read, batch, tmp_path
):
  weights = dataclasses.replace(read(1), resolution=32, frames=4)
  with pytest.raises(WeightsError, match='no V-JEPA 2.1: give --format=jax'):
    save_pretrained(tmp_path / 'hf', weights)
  write_workdir(epath.Path(tmp_path / 'ours'), weights)
  model = load(tmp_path / 'ours', resize=False)
  assert model.encoder.levels == _LEVELS
  for name, stream in batch.items():
    pixels = stream['pixels']
    with torch.no_grad():
      expected = reference[0](reference21.normalize(pixels)).numpy()
    given = pixels[:, 0] if name == 'image' else pixels
    every = model.encode(given, 'concatenated')
    np.testing.assert_allclose(every, expected, atol=1e-4)
    levels = model.encode(given, 'levels')
    np.testing.assert_array_equal(np.concatenate(levels, axis=-1), every)
    np.testing.assert_allclose(model.encode(given), levels[-1], atol=1e-6)
  with pytest.raises(ValueError, match='whose outputs are the levels'):
    weights.encoder.apply(
      {'params': weights.encoder_params}, pixels, layers=(1,)
    )


@pytest.mark.parametrize('modality', ['video', 'image'])
def test_features_and_predictions(
  modality, reference, read, batch, check_parity
):
  """All of it on positions that are rescaled, and on grids of no square."""
  stream, grid = batch[modality], _GRIDS[modality]
  mask = stream['masks'][0]
  video = reference21.normalize(stream['pixels'])
  ids = {k: torch.tensor(v).long() for k, v in mask.items()}
  hub = copy.deepcopy(reference[2])
  hub.rescaled = False
  interleaved = {'predictor_positions': 'rope_interleaved'}
  for predictor, options, name in (
    (reference[1], {}, 'all levels'),
    (reference[2], {}, 'distilled'),
    (hub, interleaved, 'distilled, torch.hub'),
  ):
    fused = predictor is reference[1]
    weights = read(1 if fused else 2, **options)
    encoder = weights.encoder

    @jax.jit
    def run(stream, encoder=encoder, weights=weights, fused=fused):
      targets = FeatureTargets(encoder, levels=_LEVELS).encode_parts(
        weights.encoder_params, stream, ('target', 'context')
      )
      mask = stream['masks'][0]
      seen = encode_levels(
        encoder,
        weights.encoder_params,
        stream['pixels'],
        mask['context'],
        _LEVELS if fused else None,
      )
      return (
        *(part[0] for part in targets),
        seen,
        *weights.predictor.apply(
          {'params': weights.predictor_params},
          *(seen, mask['context'], mask['target'], grid),
          is_image=encoder.is_image(stream['pixels'].shape),
        ),
      )

    with torch.no_grad():
      truth = reference21.normalize_levels(reference[0](video), 4)
      seen = reference[0](video, ids['context'])
      if not fused:
        seen = seen[..., -48:]
      predicted = predictor(
        seen, ids['context'], ids['target'], grid, modality == 'image'
      )
    rows = (
      ('teacher targets, hidden', reference21.take(truth, ids['target'])),
      ('teacher targets, visible', reference21.take(truth, ids['context'])),
      ('student features', seen),
      ('predictions, hidden', predicted[0]),
      ('predictions, visible', predicted[1]),
    )
    # The encoder is the same, but for how many levels are seen.
    shown = {'all levels': 0, 'distilled': 2}.get(name, 3)
    for (part, expected), actual in zip(rows, run(stream), strict=True):
      if part in [row[0] for row in rows[shown:]]:
        row = f'{_ROWS[modality]}, {name}: {part}'
        check_parity('V-JEPA 2.1', row, actual, expected)


def test_joint_training(reference, objective, batch, note_error, check_parity):
  """Loss and gradients of one step, and twenty steps of videos and images."""
  goal, params = objective
  tx, steps = make_optimizer(), 20
  rates = {'learning_rate': 1e-3, 'weight_decay': 0.04}
  differentiate = jax.jit(jax.value_and_grad(goal.loss, has_aux=True))
  apply = jax.jit(functools.partial(update, tx, rates=rates, max_norm=np.inf))

  encoder, predictor = map(copy.deepcopy, reference[:2])
  target = copy.deepcopy(encoder)
  named = [*encoder.named_parameters(), *predictor.named_parameters()]
  decays = [[], []]
  for name, parameter in named:
    decays['bias' in name or parameter.ndim == 1].append(parameter)
  optimizer = torch.optim.AdamW(
    [{'params': decays[0], 'weight_decay': 0.04},
     {'params': decays[1], 'weight_decay': 0.0}],
    lr=1e-3,
  )  # fmt: skip
  state, frozen = tx.init(params), params['encoder']
  errors = {name: [] for name in batch}
  for step in range(steps):
    losses = {
      name: reference21.compute_loss(
        *(encoder, predictor, target, stream, _GRIDS[name], _WEIGHTS[name]),
        levels=4,
        weighted=True,
      )
      for name, stream in batch.items()
    }
    expected = (1 - _SHARE) * losses['video'] + _SHARE * losses['image']
    optimizer.zero_grad()
    expected.backward()
    (loss, metrics), grads = differentiate(params, frozen, batch)
    for name, value in losses.items():
      found = float(metrics[f'{name}/loss'])
      errors[name].append(abs(found / value.item() - 1))
    if step == 0:
      assert not any(t.grad.any() for t in predictor.mask_tokens[1:]
                     if t.grad is not None)  # fmt: skip
      for table, module, tree in (
        (names.make_encoder_21(_LEVELS), encoder, grads['encoder']),
        (names.make_predictor_21(True), predictor, grads['predictor']),
      ):
        found = layout.export(table, tree, tubelet=_TUBELET)
        wanted = {k: p.grad for k, p in module.named_parameters()}
        differences = [
          np.abs(x - wanted[k].numpy()).max() / wanted[k].abs().max().item()
          for k, x in found.items()
        ]
        kind = type(module).__name__.lower()
        row = f'gradients of the {kind}, relative'
        note_error('V-JEPA 2.1', row, max(differences), 1e-5)
    optimizer.step()
    params, state, _ = apply(params, state, grads, loss=loss)
    frozen = optax.incremental_update(params['encoder'], frozen, 1 - 0.99925)
    with torch.no_grad():
      for old, new in zip(
        target.parameters(), encoder.parameters(), strict=True
      ):
        old.mul_(0.99925).add_((1 - 0.99925) * new)
  for name, values in errors.items():
    row = f'{name} loss of the first step, relative'
    note_error('V-JEPA 2.1', row, values[0], 1e-5)
    row = f'{name} losses of 20 joint steps, relative'
    note_error('V-JEPA 2.1', row, max(values), 1e-4)


def test_a_modality_trains_its_own_tokenizer_alone(objective, batch):
  goal, params = objective
  images = dataclasses.replace(goal, image_share=1.0)

  @jax.jit
  @jax.grad
  def differentiate(params):
    return images.loss(params, params['encoder'], batch)[0]

  grads = differentiate(params)
  for module in grads.values():
    assert module['modality_image'].any()
    assert not module['modality_video'].any()
  encoder = grads['encoder']
  assert encoder['embed_image']['proj']['kernel'].any()
  for value in jax.tree.leaves(encoder['embed']):
    assert not value.any()


def test_floats_are_taken_as_normalised(objective, batch):
  goal, params = objective
  pixels, encoder = batch['image']['pixels'], {'params': params['encoder']}
  apply = jax.jit(goal.encoder.apply)
  np.testing.assert_allclose(
    apply(encoder, normalize_pixels(pixels)), apply(encoder, pixels), atol=1e-5
  )


def test_weights_of_visible_tokens_as_published(note_error):
  found = [
    float(ramp_weight(0.5, (15_000, 30_000), step))
    for step in (0, 15_000, 22_500, 30_000)
  ]
  error = np.abs(np.subtract(found, [0.0, 0.0, 0.25, 0.5])).max()
  row = 'weight at steps 0, 15,000, 22,500 and 30,000'
  note_error('V-JEPA 2.1', row, error, 0.0)
  rng = np.random.default_rng(0)
  for name, grid in _GRIDS.items():
    # Few targets, from which others are at all distances.
    ids = np.stack([rng.permutation(np.prod(grid)) for _ in range(5)])
    target, context = np.split(ids, [2], axis=1)
    weights = jax.lax.rsqrt(measure_distance(context, target, grid))
    expected = reference21.weigh(context, target, grid).numpy()
    assert len(np.unique(expected)) > 4
    error = np.abs(weights - expected).max()
    note_error('V-JEPA 2.1', f'{_ROWS[name]}: weights by distance', error, 1e-6)
