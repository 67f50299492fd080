"""Encoder and predictor: shapes, positions, equivalences users rely on."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.models import positions, transformer, tubelets, zoo
from vjepa_jax.models.attention import attend
from vjepa_jax.models.attention_mask import block_causal
from vjepa_jax.models.probe import AttentiveProbe, compute_attention
from vjepa_jax.models.tpu_attention import attend_lanes

TUBELET = (2, 8, 8)
GRID = (4, 4, 4)


def _video(shape=(2, 8, 32, 32, 3), seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _encoder(**fields):
  return zoo.build_encoder('nano', tubelet=TUBELET, **fields)


def _init(encoder, video=None):
  video = _video() if video is None else video
  return jax.jit(encoder.init)(jax.random.key(0), video)['params']


def _make_tables(ids, head_dim, style):
  coordinates = positions.compute_coordinates(jnp.asarray(ids), GRID)
  return positions.make_rope_tables(coordinates, head_dim, style)


def _count_millions(model, *arguments, **static):
  init = functools.partial(model.init, jax.random.key(0), **static)
  params = jax.eval_shape(init, *arguments)
  return sum(x.size for x in jax.tree.leaves(params)) / 1e6


@pytest.mark.parametrize(
  'name,sides,millions,heads,predictor_millions',
  [
    ('tiny', (192, 12, 3), 5.6, None, None),
    ('small', (384, 12, 6), 21.9, None, None),
    ('base', (768, 12, 12), 86.2, None, None),
    ('large', (1024, 24, 16), 303.9, None, 22.1),
    ('huge', (1280, 32, 16), 631.7, None, 22.3),
    ('giant', (1408, 40, 22), 1012.2, 12, 22.4),
    ('gigantic', (1664, 48, 26), 1843.9, None, None),
  ],
)
def test_named_sizes_have_the_published_numbers_of_parameters(
  name, sides, millions, heads, predictor_millions
):
  encoder = zoo.build_encoder(name)
  assert (encoder.width, encoder.depth, encoder.num_heads) == sides
  video = jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.uint8)
  assert _count_millions(encoder, video) == pytest.approx(millions, abs=0.06)
  if predictor_millions:
    predictor = zoo.build_predictor(encoder, num_heads=heads)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    context = jax.ShapeDtypeStruct((1, 4, encoder.width), jnp.float32)
    count = _count_millions(predictor, context, ids, ids, grid=(8, 14, 14))
    assert count == pytest.approx(predictor_millions, abs=0.06)


def test_patchify_keeps_raster_order_and_inverts():
  video = _video((1, 4, 16, 24, 3))
  tokens = tubelets.patchify(jnp.asarray(video), TUBELET)
  assert tokens.shape == (1, 2 * 2 * 3, 2 * 8 * 8 * 3)
  # Token (t, h, w) = (1, 0, 2).
  expected = video[0, 2:4, 0:8, 16:24].reshape(-1)
  np.testing.assert_array_equal(tokens[0, 1 * 6 + 2], expected)
  back = tubelets.unpatchify(tokens, (2, 2, 3), TUBELET)
  np.testing.assert_array_equal(back, video)


def test_embedding_is_the_published_strided_convolution():
  video = _video((1, 4, 16, 16, 3))
  embed = tubelets.TubeletEmbed(5)
  tokens = tubelets.patchify(jnp.asarray(video), TUBELET)
  params = embed.init(jax.random.key(0), tokens)['params']
  kernel = params['proj']['kernel'].reshape(*TUBELET, 3, 5)
  pixels = (video - np.array(tubelets.PIXEL_MEAN)) / tubelets.PIXEL_STD
  expected = jax.lax.conv_general_dilated(
    pixels.astype(np.float32),
    kernel,
    TUBELET,
    'VALID',
    dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
  ).reshape(1, -1, 5)
  actual = embed.apply({'params': params}, tokens)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_clips_normalised_by_themselves_ignore_brightness_and_contrast():
  video = _video((2, 4, 16, 16, 3))
  dimmed = (video // 2 + np.array([10, 30, 5])).astype(np.uint8)
  doubled = (video // 2 * 2).astype(np.uint8)
  encoder = _encoder(pixel_norm='clip')
  params = {'params': _init(encoder, video)}
  apply = jax.jit(encoder.apply)
  features = [apply(params, x) for x in (doubled, dimmed, video)]
  published = jax.jit(_encoder(pixel_norm='imagenet').apply)
  bright, dark = (published(params, x) for x in (doubled, dimmed))
  change = np.abs(features[0] - features[1]).mean()
  assert change < 0.05 * np.abs(bright - dark).mean()
  # Floats are taken as they are.
  pixels = tubelets.normalize_clips(jnp.asarray(video))
  np.testing.assert_allclose(pixels.mean((1, 2, 3)), 0.0, atol=1e-5)
  np.testing.assert_allclose(apply(params, pixels), features[2], atol=1e-5)


def test_sincos_table_is_the_published_one():
  dim, grid = 20, (2, 3, 4)  # 2 * ceil(20 / 6) = 8 features an axis
  table = positions.make_sincos_table(grid, dim)
  assert table.shape == (24, dim) and table.dtype == np.float32
  for token in (0, 7, 23):
    t, h, w = token // 12, token % 12 // 4, token % 4
    features = []
    for position in (t, h, w):
      angles = [position / 10000 ** (k / 4) for k in range(4)]
      features += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
    np.testing.assert_allclose(table[token], features[:dim], atol=1e-6)


@pytest.mark.parametrize('style', positions.ROPE_STYLES)
@pytest.mark.parametrize(
  'head_dim,axis_dim',
  [(64, 20), (80, 26), (88, 28), (32, 10), (24, 8), (104, 34)],
)
def test_rope_follows_the_published_formulas(head_dim, axis_dim, style):
  token = 1 * 16 + 2 * 4 + 3
  x = np.random.default_rng(0).normal(size=head_dim)
  expected = x.copy()
  half = axis_dim // 2
  for axis, position in enumerate((1, 2, 3)):
    for i in range(axis_dim):
      frequency = i % half if style == 'tiled' else i // 2
      angle = position * 10000.0 ** (-frequency / half)
      j = axis * axis_dim + i
      partner = -x[j + 1] if i % 2 == 0 else x[j - 1]
      expected[j] = x[j] * np.cos(angle) + partner * np.sin(angle)
  tables = _make_tables([[token]], head_dim, style)
  y = positions.rotate(jnp.asarray(x[None, None, None], jnp.float32), tables)
  np.testing.assert_allclose(y[0, 0, 0], expected, atol=1e-5)


def test_gelu_is_exact():
  x = jnp.linspace(-6, 6, 101)
  expected = jax.nn.gelu(x, approximate=False)
  np.testing.assert_allclose(transformer.gelu(x), expected, atol=1e-6)
  slopes = (
    jax.vmap(jax.grad(gelu))(x)
    for gelu in (transformer.gelu, lambda x: jax.nn.gelu(x, approximate=False))
  )
  np.testing.assert_allclose(*slopes, atol=1e-6)


def test_layer_norm_and_its_gradient_are_flax_s():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(3.0, 2.0, (2, 3, 5, 16)), jnp.float32)
  params = {
    'scale': jnp.asarray(rng.normal(size=16), jnp.float32),
    'bias': jnp.asarray(rng.normal(size=16), jnp.float32),
  }

  def run(module):
    out, pull = jax.vjp(
      lambda *a: module.apply({'params': a[0]}, a[1]), params, x
    )
    return out, pull(jnp.sin(out))

  reference = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
  compare = functools.partial(np.testing.assert_allclose, atol=2e-5)
  jax.tree.map(compare, run(transformer.LayerNorm()), run(reference))


@pytest.mark.parametrize('kind', positions.POSITIONS)
def test_tokens_depend_on_visible_pixels_and_on_no_order(kind):
  encoder = _encoder(positions=kind)
  params, video = {'params': _init(encoder)}, _video()
  apply = jax.jit(encoder.apply)
  whole = apply(params, video)
  assert whole.shape == (2, 64, 48)
  order = np.random.default_rng(0).permutation(64)
  shuffled = apply(params, video, jnp.tile(order, (2, 1)))
  np.testing.assert_allclose(shuffled, whole[:, order], atol=1e-5)
  ids = jnp.tile(jnp.arange(0, 64, 3), (2, 1))
  changed = np.array(tubelets.patchify(jnp.asarray(video), TUBELET))
  hidden = np.setdiff1d(np.arange(64), ids[0])
  changed[:, hidden] = 255 - changed[:, hidden]
  changed = tubelets.unpatchify(jnp.asarray(changed), GRID, TUBELET)
  np.testing.assert_array_equal(
    apply(params, changed, ids), apply(params, video, ids)
  )


def test_remat_changes_no_gradient():
  video = _video()

  @functools.partial(jax.jit, static_argnums=0)
  def differentiate(encoder, params):
    loss = jax.grad(lambda p: jnp.square(encoder.apply(p, video)).mean())
    return loss(params)

  encoder = _encoder(positions='rope_tiled')
  params = {'params': _init(encoder)}
  expected = differentiate(encoder, params)
  compare = functools.partial(np.testing.assert_allclose, atol=1e-6)
  for remat in {*transformer.REMAT_POLICIES} - {'none'}:
    actual = differentiate(encoder.clone(remat=remat), params)
    jax.tree.map(compare, actual, expected)


def test_initialisation_of_v1_and_v2():
  video = np.zeros((1, 2, 16, 16, 3), np.uint8)
  for scaled, std in ((False, 0.02), (True, 0.08), (True, 0)):
    encoder = zoo.build_encoder(
      'micro', scale_init_by_depth=scaled, init_std=std
    )
    blocks = _init(encoder, video)['transformer']['blocks']
    for kernel in (
      blocks['mlp']['fc2']['kernel'],
      blocks['attention']['out_kernel'],
    ):
      for layer in range(encoder.depth):
        expected = std or np.prod(kernel.shape[1:-1]) ** -0.5
        expected /= np.sqrt(2 * (layer + 1)) if scaled else 1
        assert float(kernel[layer].std()) == pytest.approx(expected, rel=0.03)
    query = blocks['attention']['query']
    assert float(query['kernel'].std()) == pytest.approx(
      std or encoder.width**-0.5, rel=0.03
    )
    assert not query['bias'].any()
    # Layers differ from each other.
    assert (query['kernel'][0] != query['kernel'][1]).all()


def test_images_and_clips_of_other_sizes():
  encoder = _encoder()
  params = _init(encoder)
  image = _video((2, 32, 32, 3))
  features = encoder.apply({'params': params}, image)
  assert features.shape == (2, 16, 48)
  still = np.repeat(image[:, None], 2, axis=1)
  np.testing.assert_allclose(
    features, encoder.apply({'params': params}, still), atol=1e-5
  )
  wide = encoder.apply({'params': params}, _video((1, 16, 24, 40, 3)))
  assert wide.shape == (1, 8 * 3 * 5, 48)


def test_bfloat16_compute_keeps_float32_parameters():
  encoder, exact = _encoder(dtype=jnp.bfloat16), _encoder()
  params = _init(encoder)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  features, expected = (
    jax.jit(e.apply)({'params': params}, _video()) for e in (encoder, exact)
  )
  assert features.dtype == jnp.bfloat16
  np.testing.assert_allclose(features.astype(jnp.float32), expected, atol=0.1)


def test_predictor_of_hidden_tokens_and_of_visible_ones():
  fields = dict(num_heads=2, width=24, depth=2, num_mask_tokens=2)
  plain, dense = (
    zoo.build_predictor(
      _encoder(positions='rope_tiled'), **fields, predict_context=both
    )
    for both in (False, True)
  )
  context = jax.random.normal(jax.random.key(1), (2, 5, 48))
  ids = jnp.tile(jnp.arange(12), (2, 1))
  args = context, ids[:, :5], ids[:, 5:], GRID
  expected, params = (
    model.init(jax.random.key(0), *args)['params'] for model in (plain, dense)
  )
  assert not params['mask_tokens'].any()
  head = params.pop('proj_context')
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  params |= {'proj_context': head, 'mask_tokens': jnp.eye(2, 24)}

  @functools.partial(jax.jit, static_argnums=1)
  def apply(context, mask_index=0):
    return dense.apply({'params': params}, context, *args[1:], mask_index)

  hidden, visible = apply(context)
  assert hidden.shape == (2, 7, 48) and visible.shape == (2, 5, 48)
  # What is predicted depends on context and mask token; these wrap around.
  assert (apply(context.at[:, 0].add(1.0))[0] != hidden).any()
  assert (apply(context, 1)[0] != hidden).any()
  np.testing.assert_array_equal(apply(context, 2)[0], hidden)
  expected['mask_tokens'] = params['mask_tokens']
  alone = plain.apply({'params': expected}, *args)
  np.testing.assert_allclose(alone, hidden, atol=1e-6)
  # Given specs, a pair of tuples; the second has the second mask token.
  specs = [(x, x) for x in args[:3]]
  both = tuple(zip(*dense.apply({'params': params}, *specs, GRID), strict=True))
  assert len(both) == 2
  for actual, wanted in zip(both[1], apply(context, 1), strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_attentive_probe_attends_to_all_tokens():
  probe = AttentiveProbe(
    num_classes=5, num_heads=1, depth=1, output_projection=False
  )
  features = jax.random.normal(jax.random.key(0), (3, 9, 48))
  params = probe.init(jax.random.key(1), features)['params']
  params['query'] *= 50.0  # something to look for
  params['key_proj']['kernel'] *= 50.0
  apply = jax.jit(
    functools.partial(
      probe.apply, capture_intermediates=True, mutable='intermediates'
    )
  )
  logits, captured = apply({'params': params}, features)
  assert logits.shape == (3, 5)
  # The order of the tokens does not matter, their content does.
  for other, same in ((features[:, ::-1], 1), (features.at[:, 8].mul(-1), 0)):
    difference = np.abs(apply({'params': params}, other)[0] - logits).max()
    assert (difference < 1e-6) == same, difference
  attention = compute_attention(probe, params, features)
  assert attention.shape == (3, 9) and attention.max() > 0.15
  np.testing.assert_allclose(attention.sum(axis=1), 1.0, atol=1e-5)
  # It is what the query gathers.
  values, normed = (
    captured['intermediates'][name]['__call__'][0]
    for name in ('value_proj', 'norm2')
  )
  gathered = params['query'] + attention[:, None] @ values
  gathered -= gathered.mean(axis=-1, keepdims=True)
  gathered /= np.sqrt((gathered**2).mean(axis=-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(gathered, normed, atol=1e-4)


@pytest.mark.parametrize(
  'make,message',
  [
    (lambda: zoo.build_encoder('enormous'), "size 'enormous' is not one of"),
    (lambda: _encoder(positions='learned'), "positions 'learned' is not one"),
    (lambda: _encoder(pixel_norm='x'), "pixel_norm 'x' is not one of"),
    (lambda: _init(_encoder(remat='some')), "remat 'some' is not one of"),
    (lambda: _init(_encoder(attention='flash')), "'flash' is not one of"),
    (
      lambda: _init(_encoder(), _video((1, 8, 30, 32, 3))),
      'height of the clip, 30, is not a multiple of the tubelet, 8',
    ),
    (
      lambda: zoo.build_predictor(_encoder(), num_heads=5, width=24),
      'width 24 is not divisible by its 5 heads',
    ),
    (lambda: _make_tables([[0]], 24, 'x'), "RoPE style 'x'"),
    (
      lambda: _encoder().init(
        jax.random.key(0), _video(), coordinates=jnp.zeros((64, 3))
      ),
      "positions 'sincos' have no coordinates",
    ),
    (
      lambda: attend(*[jnp.zeros((1, 1, 9, 8))] * 3, 'cudnn', block_causal(3)),
      r"'cudnn' takes block_causal\(3\) of an even number of tokens, not 9",
    ),
    (
      lambda: attend_lanes(None, None, (8,), 128, 1.0, mask=block_causal(4)),
      r'attend_lanes has no block_causal\(4\) mask: take attention.attend',
    ),
  ],
)
def test_errors_name_the_thing_and_what_exists(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_drop_path_grows_with_depth_and_keeps_the_mean():
  model = transformer.Transformer(
    depth=3, num_heads=2, mlp_dim=32, drop_path_rate=0.8
  )
  apply = jax.jit(model.apply)
  x = jax.random.normal(jax.random.key(1), (1, 2, 16))
  params = jax.jit(model.init)(jax.random.key(0), x)
  x = jnp.tile(x, (4096, 1, 1))
  blocks = params['params']['blocks']
  blocks['mlp']['fc2'] = jax.tree.map(jnp.zeros_like, blocks['mlp']['fc2'])
  kernel = blocks['attention']['out_kernel']
  for active, rate in enumerate((0.0, 0.4, 0.8)):
    # One block adds something, so that what is dropped can be told.
    only = (jnp.arange(3) == active).reshape(3, 1, 1, 1)
    blocks['attention']['out_kernel'] = kernel * jnp.where(only, 50.0, 0.0)
    whole = apply(params, x) - x
    added = apply(params, x, rngs={'drop_path': jax.random.key(2)}) - x
    dropped = np.asarray((added == 0).all(axis=(1, 2)))
    assert dropped.mean() == pytest.approx(rate, abs=0.03)
    np.testing.assert_allclose(
      added[~dropped], whole[~dropped] / (1 - rate), rtol=1e-3, atol=1e-6
    )


def test_drop_path_is_off_in_evaluation_and_at_rate_0():
  video = _video()
  params = jax.eval_shape(lambda: _init(_encoder()))

  def run(rate, **rngs):
    def apply(params, video, key):
      rngs_ = {name: key for name in rngs}
      encoder = _encoder(drop_path_rate=rate)
      return encoder.apply({'params': params}, video, rngs=rngs_)

    return jax.jit(apply).lower(params, video, jax.random.key(0)).as_text()

  assert run(0.5) == run(0.0) == run(0.0, drop_path=True)
  assert run(0.5, drop_path=True) != run(0.0)


@pytest.fixture(scope='module')
def deep():
  """An encoder of four blocks, its parameters and a clip."""
  encoder = zoo.build_encoder(
    'mini',
    tubelet=TUBELET,
    positions='rope_interleaved',
    remat='full',
    init_std=0.0,
  )
  video = _video((2, 4, 16, 16, 3))
  return encoder, jax.jit(encoder.init)(jax.random.key(0), video), video


def test_outputs_of_several_layers_are_those_of_shallower_encoders(deep):
  encoder, params, video = deep
  ids = tuple(jnp.broadcast_to(jnp.arange(n), (2, n)) for n in (8, 3))
  layers = 0, 2

  def run(params):
    return encoder.apply(params, video, ids, layers)

  def run_shallow(params):
    outputs = []
    for depth in (layer + 1 for layer in layers):
      cut = jax.tree_util.tree_map_with_path(
        lambda path, x, n=depth: x[:n] if 'blocks' in str(path) else x, params
      )
      outputs.append(encoder.clone(depth=depth).apply(cut, video, ids))
    return tuple(outputs)

  def differentiate(run):
    def loss(params):
      outputs = run(params)
      return sum(jnp.sum(x**3) for x in jax.tree.leaves(outputs)), outputs

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  actual, expected = differentiate(run), differentiate(run_shallow)
  assert [[x.shape[1] for x in specs] for specs in actual[1]] == [[8, 3]] * 2
  compare = functools.partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-3)
  jax.tree.map(compare, actual, expected)


def test_outputs_of_layers_that_are_not_wanted_are_not_kept(deep):
  encoder, params, video = deep
  jaxpr = jax.make_jaxpr(lambda p: encoder.apply(p, video, layers=(1,)))(params)
  assert 'f32[2,8,128]' in str(jaxpr)
  assert 'f32[4,2,8,128]' not in str(jaxpr)
  with pytest.raises(ValueError, match='encoder with 4 blocks: name some of 0'):
    encoder.apply(params, video, layers=(2, 4))


def test_rope_sees_coordinates_and_only_their_differences(deep):
  encoder, params, video = deep
  predictor = zoo.build_predictor(encoder, num_heads=2, width=24, depth=2)
  ids = jnp.arange(6)[None], jnp.arange(6, 8)[None]
  context = jax.random.normal(jax.random.key(1), (1, 6, 128))
  arguments = context, *ids, (2, 2, 2)
  weights = predictor.init(jax.random.key(2), *arguments)

  def run(coordinates):
    features = encoder.apply(params, video, coordinates=coordinates)
    predictions = predictor.apply(weights, *arguments, coordinates=coordinates)
    return features, predictions

  grid = positions.compute_coordinates(jnp.arange(8), (2, 2, 2))
  for a, b, moved, scaled in zip(
    *map(run, (None, grid, grid + jnp.array([7.0, 0.5, -3.0]), grid * 2.5)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(moved, a, atol=1e-4)
    assert np.abs(scaled - a).max() > 1e-3
