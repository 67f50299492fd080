"""Official files: exact conversions, clear errors."""

import os
import pickle

from absl import logging
import jax
import numpy as np
import pytest
from tiny_models import TUBELET, check_refused, fill, make_weights

from vjepa_jax.interop import layout, names, pytorch
from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.load import make_abstract
from vjepa_jax.models import zoo
from vjepa_jax.models.probe import AttentiveProbe

NEEDS_TORCH = 'the extra parity has torch'


def _make_states(num_mask_tokens=2):
  """Makes the states of an official encoder and predictor."""
  weights = make_weights('sincos', depth=3, num_mask_tokens=num_mask_tokens)
  return (
    layout.export(names.ENCODER, weights.encoder_params, tubelet=TUBELET),
    layout.export(names.PREDICTOR, weights.predictor_params),
  )


def _make_probe_state(depth=0):
  """Makes the state of an official probe: V-JEPA 2's if it has blocks."""
  probe = AttentiveProbe(
    num_classes=5, num_heads=2, depth=depth, output_projection=not depth
  )
  return layout.export(names.PROBE, fill(make_abstract(probe, 48), 1))


def _read(family, state, num_heads=2):
  return layout.read(family, layout.Tensors(state, 'it'), num_heads=num_heads)


def _to_torch(state, prefix='module.backbone.'):
  torch = pytest.importorskip('torch', reason=NEEDS_TORCH)
  return {prefix + k: torch.from_numpy(v.copy()) for k, v in state.items()}


@pytest.fixture
def save(tmp_path):
  """Writes a checkpoint as the official code does."""
  torch = pytest.importorskip('torch', reason=NEEDS_TORCH)

  def write(content, name='model.pth.tar'):
    path = tmp_path / name
    torch.save(content, path)
    return path

  return write


def _assert_equal(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
    actual,
    expected,
  )


def test_round_trips_are_exact_to_the_bit():
  weights = make_weights()
  for family, params in (
    (names.ENCODER, weights.encoder_params),
    (names.PREDICTOR, weights.predictor_params),
  ):
    for system in ('official', 'huggingface'):
      state = layout.export(family, params, system, tubelet=TUBELET)
      assert all(x.flags.c_contiguous for x in state.values())
      tensors = layout.Tensors(state, 'it')
      _, back = layout.read(family, tensors, system, num_heads=2)
      _assert_equal(back, params)
      assert not tensors.list_unused()
  for depth in (0, 3):
    state = _make_probe_state(depth)
    _, params = _read(names.PROBE, state)
    _assert_equal(layout.export(names.PROBE, params), state)


def test_layouts_are_the_published_ones():
  params = make_weights('sincos', depth=3).encoder_params
  state, predictor = _make_states()
  block = jax.tree.map(lambda x: x[1], params['transformer']['blocks'])
  assert state['patch_embed.proj.weight'].shape == (48, 3, *TUBELET)
  kernel = params['embed']['proj']['kernel'].reshape(*TUBELET, 3, 48)
  assert (
    state['patch_embed.proj.weight'][7, 2, 1, 3, 5] == kernel[1, 3, 5, 2, 7]
  )
  qkv = state['blocks.1.attn.qkv.weight'].reshape(3, 2, 24, 48)
  assert qkv[1, 1, 5, 7] == block['attention']['key']['kernel'][7, 1, 5]
  out = state['blocks.1.attn.proj.weight'].reshape(48, 2, 24)
  assert out[7, 1, 5] == block['attention']['out_kernel'][1, 5, 7]
  assert state['blocks.1.mlp.fc1.weight'].shape == (192, 48)
  assert set(predictor) > {
    'predictor_embed.weight',
    'mask_tokens.1',
    'predictor_blocks.2.attn.proj.bias',
    'predictor_norm.bias',
    'predictor_proj.weight',
  }
  assert predictor['mask_tokens.1'].shape == (1, 1, 24)
  block = 'pooler.cross_attention_block'
  probe = _make_probe_state(1)
  assert probe['pooler.query_tokens'].shape == (1, 1, 48)
  assert probe[f'{block}.xattn.kv.weight'].shape == (96, 48)
  assert f'{block}.xattn.proj.weight' in _make_probe_state()
  parts = 'norm1.bias', 'xattn.q.weight', 'mlp.fc2.bias'
  others = 'pooler.blocks.0.attn.qkv.bias', 'linear.weight'
  assert set(probe) > {*(f'{block}.{part}' for part in parts), *others}


def test_tubelets_must_fit():
  with pytest.raises(WeightsError, match='embeds 384 numbers a tubelet'):
    layout.export(names.ENCODER, make_weights().encoder_params)


def test_files_of_v1(save, caplog):
  states = _make_states()
  target = {k: v + 1 for k, v in states[0].items()}
  # 16 frames of 32 pixels.
  table = {'pos_embed': np.zeros((1, 8 * 4 * 4, 48), np.float32)}
  path = save(
    {
      'encoder': _to_torch(states[0] | table),
      'target_encoder': _to_torch(target | table),
      'predictor': _to_torch(
        states[1] | {'predictor_pos_embed': np.zeros((1, 128, 24), np.float32)}
      ),
      'opt': {'state': {}, 'param_groups': []},
      'epoch': 3,
      'lr': 1e-3,
    }
  )
  logging.get_absl_logger().propagate = True
  with caplog.at_level('INFO', logger='absl'):
    weights = pytorch.read_checkpoint(path)
  assert "positions 'sincos', because it has a table" in caplog.text
  assert caplog.text.count('not used:') == 1
  assert weights.unused == (
    'target_encoder/pos_embed',
    'predictor/predictor_pos_embed',
  )
  _assert_equal(weights.encoder_params, _read(names.ENCODER, target)[1])
  assert weights.encoder == zoo.build_encoder('nano', tubelet=TUBELET)
  assert (weights.predictor.num_heads, weights.predictor.depth) == (2, 3)
  assert weights.predictor.num_mask_tokens == 2
  assert (weights.resolution, weights.frames) == (32, 16)
  student = pytorch.read_checkpoint(path, 'encoder', with_predictor=False)
  assert student.predictor is None
  _assert_equal(student.encoder_params, _read(names.ENCODER, states[0])[1])


def test_files_of_v2(save, caplog):
  encoder, predictor = _make_states(num_mask_tokens=4)
  # Released files carry a stale table.
  encoder['pos_embed'] = np.zeros((1, 128, 48), np.float32)
  path = save(
    {'encoder': _to_torch(encoder), 'predictor': _to_torch(predictor)}, 'v.pt'
  )
  logging.get_absl_logger().propagate = True
  with caplog.at_level('INFO', logger='absl'):
    weights = pytorch.read_checkpoint(path)
  assert 'no target_encoder in the file: taking encoder' in caplog.text
  assert "'rope_tiled', because it has 4 mask tokens" in caplog.text
  assert weights.encoder.positions == weights.predictor.positions
  assert weights.encoder.positions == 'rope_tiled'
  assert weights.predictor.num_heads == 12
  assert weights.resolution is None and weights.frames is None
  alone = pytorch.read_checkpoint(path, with_predictor=False)
  assert alone.encoder.positions == 'rope_tiled' and alone.predictor is None
  weights = pytorch.read_checkpoint(
    path, positions='rope_interleaved', num_heads=4, predictor_heads=3
  )
  assert weights.encoder.positions == 'rope_interleaved'
  assert (weights.encoder.num_heads, weights.predictor.num_heads) == (4, 3)
  del encoder['pos_embed']
  for content in ({'ema_encoder': _to_torch(encoder)}, _to_torch(encoder, '')):
    weights = pytorch.read_checkpoint(save(content))
    assert weights.encoder.positions == 'rope_tiled'


def test_files_of_v2_are_written(tmp_path):
  pytest.importorskip('torch', reason=NEEDS_TORCH)
  weights, path = make_weights(num_mask_tokens=10), tmp_path / 'v.pt'
  pytorch.write_checkpoint(path, weights)
  for which in pytorch.ENCODERS:
    back = pytorch.read_checkpoint(path, which, num_heads=2, predictor_heads=2)
    assert (back.encoder, back.predictor) == (
      weights.encoder, weights.predictor
    )  # fmt: skip
    _assert_equal(back.encoder_params, weights.encoder_params)
    _assert_equal(back.predictor_params, weights.predictor_params)


def test_files_of_probes(save):
  weights = pytorch.read_checkpoint(
    save({'classifier': _to_torch(_make_probe_state(), 'module.')})
  )
  ((probe, params),) = weights.probes
  assert probe == AttentiveProbe(5, 16)
  assert weights.encoder is None and not weights.unused
  features = np.random.default_rng(0).normal(size=(2, 9, 48)).astype('float32')
  assert probe.apply({'params': params}, features).shape == (2, 5)
  state = _to_torch(_make_probe_state(3), 'module.')
  weights = pytorch.read_checkpoint(
    save({'classifiers': [state, state]}), num_heads=2
  )
  assert [p for p, _ in weights.probes] == [AttentiveProbe(5, 2, 3, False)] * 2
  assert not weights.unused
  probe, params = weights.probes[1]
  abstract = jax.eval_shape(probe.init, jax.random.key(0), features)['params']
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract)
  state = {k: v for k, v in _make_probe_state().items() if 'proj' not in k}
  probe, _ = _read(names.PROBE, state)
  assert probe == AttentiveProbe(5, 2, output_projection=False)


def _change(state, key, shape):
  """Replaces a tensor by zeros of a shape; None removes it."""
  others = {k: v for k, v in state.items() if k != key}
  return others if shape is None else others | {key: np.zeros(shape, 'f')}


@pytest.mark.parametrize(
  'key,shape,message',
  [
    ('norm.bias', None, "no tensor 'norm.bias'"),
    ('blocks.0.attn.qkv.bias', None, "no tensor 'blocks.0.attn.qkv.bias'"),
    ('blocks.3.norm1.weight', 48, "no tensor 'blocks.2.norm1.weight'"),
    (
      'blocks.1.mlp.fc2.weight', (48, 9),
      r'blocks.1.mlp.fc2.weight has shape \(48, 9\), not \(48, 192\)',
    ),
    ('blocks.0.ls1.gamma', 48, 'blocks.0.ls1.gamma has no place in it'),
    ('norms_block.0.weight', 48, 'V-JEPA 2.1 has no encoder of 2 blocks'),
    ('blocks.0.mlp.fc3.weight', 1, 'with SwiGLU perceptrons, which is not'),
    (
      'patch_embed.proj.weight', (48, 3, 8, 8),
      r'shape \(48, 3, 8, 8\), not \(any, 3, any, any, any\)',
    ),
  ],
)  # fmt: skip
def test_other_encoders_are_refused(save, key, shape, message):
  state = _change(_make_states()[0], key, shape)
  path = save({'target_encoder': _to_torch(state)})
  check_refused(pytorch.read_checkpoint, path, message, num_heads=2)


@pytest.mark.parametrize(
  'key,shape,message',
  [
    ('mask_tokens.0', None, "no tensor 'mask_tokens.0'"),
    (
      'predictor_embed.weight', (24, 96),
      r'predictor_embed.weight has shape \(24, 96\), not \(any, 48\)',
    ),
    ('predictor_proj_context.weight', 1, 'V-JEPA 2.1, which is not supported'),
    (
      'action_encoder.weight', (24, 7),
      'predictor is 24 wide, not divisible by 16 heads',
    ),
  ],
)  # fmt: skip
def test_other_predictors_are_refused(save, key, shape, message):
  encoder, state = _make_states()
  state = _change(state, key, shape)
  path = save({'encoder': _to_torch(encoder), 'predictor': _to_torch(state)})
  check_refused(pytorch.read_checkpoint, path, message)
  assert pytorch.read_checkpoint(path, with_predictor=False).encoder


def test_heads_must_divide_the_width():
  with pytest.raises(WeightsError, match='24 wide, not divisible by 7 heads'):
    _read(names.PREDICTOR, _make_states()[1], num_heads=7)


def test_other_probes_are_refused(save):
  state = _make_probe_state() | _make_probe_state(1)
  for message in (
    'of V-JEPA 1 with self-attention',
    'probe 0 anticipates actions',
  ):
    path = save({'classifier': _to_torch(state)})
    check_refused(pytorch.read_checkpoint, path, message)
    state['verb_classifier.weight'] = np.zeros((5, 48), 'f')


def test_sizes_without_a_name_ask_for_heads(save):
  encoder = _make_states()[0]
  state = {k: v for k, v in encoder.items() if not k.startswith('blocks.1.')}
  path = save({'target_encoder': _to_torch(state)})
  with pytest.raises(WeightsError, match='no named size is 48 wide and 1 deep'):
    pytorch.read_checkpoint(path)
  assert pytorch.read_checkpoint(path, num_heads=3).encoder.num_heads == 3


class _Code:
  def __reduce__(self):
    return os.system, ('touch /tmp/vjepa_jax_ran_code',)


def test_code_is_never_run(save, tmp_path):
  plain = tmp_path / 'plain.pt'
  plain.write_bytes(pickle.dumps(_Code(), protocol=2))
  for path in (save({'target_encoder': {}, 'x': _Code()}), plain):
    with pytest.raises(
      WeightsError, match='refused: loading it would run code, posix.system'
    ) as error:
      pytorch.read_checkpoint(path)
    assert '\n' not in str(error.value)
  assert not os.path.exists('/tmp/vjepa_jax_ran_code')


def test_files_that_are_no_checkpoints(save, tmp_path):
  content = {'target_encoder': _to_torch(_make_states()[0])}
  whole = save(content).read_bytes()
  path = tmp_path / 'part.pt'
  for data in (whole[: len(whole) // 2], whole[:100], b'', b'hello', b'\0' * 9):
    path.write_bytes(data)
    with pytest.raises(WeightsError, match='part.pt is truncated or no') as e:
      pytorch.read_checkpoint(path)
    assert '\n' not in str(e.value)
  with pytest.raises(WeightsError, match='there is no file'):
    pytorch.read_checkpoint(tmp_path / 'none.pt')
  for wrong, which, message in (
    ([1, 2], 'encoder', 'holds a list, not a checkpoint'),
    ({'model': 1}, 'target_encoder', "no target_encoder, only .'model'."),
    (content, 'encoder', 'has no encoder, only'),
    (content, 'teacher', "'teacher' is not one of"),
    ({'encoder': 3}, 'encoder', 'a int is where tensors should be'),
  ):
    with pytest.raises(WeightsError, match=message):
      pytorch.read_checkpoint(save(wrong), which)


def test_without_torch_the_extra_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(__import__('sys').modules, 'torch', None)
  with pytest.raises(WeightsError, match=r"pip install -e '.\[parity\]'"):
    pytorch.read_checkpoint(tmp_path / 'model.pt')
