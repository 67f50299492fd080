"""TPU kernels, interpreted: values and gradients of plain attention."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.models import attention, positions, tpu_attention, zoo
from vjepa_jax.models.attention_mask import FULL, block_causal
from vjepa_jax.models.transformer import Transformer
from vjepa_jax.models.tubelets import unpack
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.parallel.sharding import shard_batch
from vjepa_jax.training.objectives.base import init_models, predict

BATCH = 2


def _sample(*shape):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _attend_plainly(q, k, v, lengths, rope):
  """Reference over `[B, heads, N, d]`, one sequence at a time."""
  if rope is not None:
    q, k = (positions.rotate(x, rope) for x in (q, k))
  outputs = []
  for a, b, c in zip(*(unpack(x, lengths, 2) for x in (q, k, v)), strict=True):
    scores = jnp.einsum('bhnd,bhmd->bhnm', a, b) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1)
    outputs.append(jnp.einsum('bhnm,bhmd->bhnd', weights, c))
  return jnp.concatenate(outputs, axis=2)


def _interleave(x, axis):
  """Lays three `[..., heads, d]` out as `attend_lanes` takes them."""
  flat = [a.reshape(*a.shape[:-2], -1, tpu_attention.LANES) for a in x]
  return jnp.stack(flat, axis=axis).reshape(*flat[0].shape[:-2], -1)


@pytest.mark.parametrize(
  'lengths,num_heads,head_dim,shared_rope',
  [
    ((24, 16), 8, 32, None),
    ((24, 16), 4, 64, True),
    ((304, 104), 2, 64, False),  # more than a chunk, not a multiple of it
    ((512,), 1, 128, None),
  ],
)
def test_lanes_kernel_is_attention(lengths, num_heads, head_dim, shared_rope):
  shape = BATCH, num_heads, sum(lengths), head_dim
  *qkv, gradient = _sample(4, *shape)
  biases = list(_sample(3, num_heads, head_dim))
  rope = wide = None
  if shared_rope is not None:
    places = _sample(1 if shared_rope else BATCH, sum(lengths), 3)
    rope = positions.make_rope_tables(4 * places, head_dim, 'tiled')
    wide = attention.widen_tables(rope, head_dim)

  def plain(qkv, biases):
    q, k, v = (x + b[:, None] for x, b in zip(qkv, biases, strict=True))
    return _attend_plainly(q, k, v, lengths, rope)

  def kernel(qkv, biases):
    out = tpu_attention.attend_lanes(
      _interleave([x.swapaxes(1, 2) for x in qkv], -2),
      _interleave([b[None] for b in biases], -2),
      lengths,
      head_dim,
      head_dim**-0.5,
      wide,
      interpret=True,
    )
    return out.reshape(BATCH, -1, num_heads, head_dim).swapaxes(1, 2)

  expected, pull_expected = jax.vjp(plain, qkv, biases)
  actual, pull_actual = jax.vjp(kernel, qkv, biases)
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  actual, expected = pull_actual(gradient), pull_expected(gradient)
  chex.assert_trees_all_close(actual[0], expected[0], atol=1e-5)
  # Those of biases are sums over hundreds of tokens.
  chex.assert_trees_all_close(actual[1], expected[1], atol=1e-4)


def test_block_causal_steps_see_themselves_and_those_before():
  q, k, v = _sample(3, 1, 2, 20, 16)
  out = attention.attend(q, k, v, 'xla', block_causal(6))
  for start in range(0, 20, 6):
    rows, end = slice(start, start + 6), start + 6
    seen = attention.attend(q[:, :, rows], k[:, :, :end], v[:, :, :end], 'xla')
    np.testing.assert_allclose(out[:, :, rows], seen, atol=1e-6)


@pytest.mark.parametrize(
  'num_tokens,mask',
  [
    (128, FULL),
    (200, FULL),
    (200, block_causal(50)),
    (1100, block_causal(275)),  # three blocks by three, one of them not seen
  ],
)
def test_splash_kernel_is_attention_at_any_length(num_tokens, mask):
  *qkv, gradient = _sample(4, BATCH, 2, num_tokens, 64)

  def run(kernel):
    out, pull = jax.vjp(lambda *x: attention.attend(*x, kernel, mask), *qkv)
    return out, pull(gradient)

  actual, expected = run('pallas_interpret'), run('xla')
  chex.assert_trees_all_close(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
  'kind,context,target',
  [
    ('rope_tiled', (8, 16), (24, 32)),  # multiples of 8: heads side by side
    ('sincos', (8, 13), (24, 32)),  # else splash
  ],
)
def test_models_do_not_depend_on_the_kernel(kind, context, target):
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (BATCH, 8, 32, 32, 3), dtype=np.uint8)
  order = np.tile(np.arange(64), (BATCH, 1))
  masks = [
    {
      part: jnp.asarray(rng.permuted(order, axis=1)[:, :count])
      for part, count in zip(('context', 'target'), counts, strict=True)
    }
    for counts in zip(context, target, strict=True)
  ]
  stream = {'pixels': video, 'masks': masks}
  encoder = zoo.build_encoder('nano', tubelet=(2, 8, 8), positions=kind)
  # Heads of 24, of which a slot of 32 holds one, three of them: the kernel has
  # room for a fourth.
  predictor = zoo.build_predictor(
    encoder, num_heads=3, width=72, depth=1, num_mask_tokens=2
  )

  def run(kernel, params):
    models = (m.clone(attention=kernel) for m in (encoder, predictor))
    return predict(*models, params, stream)[1]

  # Away from the zeros of the initialisation.
  params = jax.tree.map(
    lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32),
    init_models(jax.random.key(0), encoder, predictor),
  )

  @functools.partial(jax.jit, static_argnums=0)
  def differentiate(kernel, params):
    def loss(params):
      predictions = run(kernel, params)
      return sum(jnp.sum(jnp.sin(x)) for x in predictions), predictions

    return jax.grad(loss, has_aux=True)(params)

  def compare(a, e):
    np.testing.assert_allclose(a, e, atol=3e-5 * max(1, np.abs(e).max()))

  jax.tree.map(
    compare,
    *(differentiate(name, params) for name in ('pallas_interpret', 'xla')),
  )


def test_kernels_run_on_each_devices_rows():
  x = _sample(8, 16, 64)
  module = attention.Attention(num_heads=2, implementation='pallas_interpret')
  params = module.init(jax.random.key(0), x[:1])

  def step(params, x):
    loss = jax.value_and_grad(lambda p: jnp.sum(module.apply(p, x) ** 2))
    return loss(params)

  expected = jax.jit(step)(params, x)
  mesh = make_mesh(2, jax.devices()[:8])
  with jax.set_mesh(mesh):
    actual = jax.jit(step)(params, jax.device_put(x, shard_batch(mesh)))
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kernel', ['xla', 'pallas_interpret'])
def test_packed_steps_of_a_transformer_see_no_later_one(kernel):
  # `attend_lanes` would take these sequences, were it not for the mask.
  model = Transformer(
    depth=2, num_heads=2, mlp_dim=32, attention=kernel, mask=block_causal(4)
  )
  x = jax.random.normal(jax.random.key(0), (1, 24, 64))
  lengths = 16, 8
  params = model.init(jax.random.key(1), x, None, lengths)
  out = model.apply(params, x, None, lengths)
  # A token of the second step of four, in the first of two sequences.
  other = model.apply(params, x.at[:, 5].multiply(-1.0), None, lengths)
  changed = (other != out).any(axis=(0, 2))
  assert [bool(c) for c in changed] == [4 <= i < 16 for i in range(24)]


def test_cudnn_takes_the_mask_as_a_bias(monkeypatch):
  library = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
  monkeypatch.setattr(library, 'check_cudnn_version', lambda: 91000)

  def differentiate(mask, *x):
    return jax.grad(lambda *x: attention.attend(*x, 'cudnn', mask).sum())(*x)

  for mask, length, name in (
    (FULL, 32, 'Softmax'),
    (block_causal(8), 32, 'ScaleBiasSoftmax'),
    (block_causal(3), 9, 'ScaleBiasSoftmax'),
  ):
    x = jax.ShapeDtypeStruct((2, 4, length, 16), jnp.bfloat16)
    traced = jax.jit(functools.partial(differentiate, mask)).trace(x, x, x)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert f'__cudnn$fmha{name}Backward' in text


def test_an_odd_number_of_tokens_is_filled_up_unseen(monkeypatch):
  plain = jax.nn.dot_product_attention
  monkeypatch.setattr(
    jax.nn,
    'dot_product_attention',
    lambda *x, mask, implementation: plain(*x, mask=mask),
  )
  x = jax.random.normal(jax.random.key(0), (3, 1, 2, 9, 8))
  for mask in (block_causal(3), block_causal(4)):
    found, expected = (
      attention.attend(*x, kind, mask) for kind in ('cudnn', 'xla')
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_kernel_is_chosen_by_head_length_and_mask():
  uses = attention.uses_lanes
  assert uses('pallas', 64, (1568,)) and uses('pallas', 24, (1112, 1208))
  assert not uses('xla', 64, (1568,))
  assert not uses('pallas', 64, (1568,), block_causal(196))
  assert not uses('pallas', 80, (1568,))  # 128 lanes would be 60 % more
  assert not uses('pallas', 64, (8192,))
  assert not uses('pallas', 64, (1567,))
  assert not uses('pallas', 256, (128,))
