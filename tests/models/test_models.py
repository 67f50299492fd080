"""Encoder and predictor: shapes, positions, equivalences users rely on."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.models import encoder as encoder_lib
from vjepa_jax.models import positions, transformer, tubelets, zoo
from vjepa_jax.models.probe import AttentiveProbe, compute_attention

TUBELET = (2, 8, 8)
GRID = (4, 4, 4)


def _video(shape=(2, 8, 32, 32, 3), seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _encoder(**fields):
  return zoo.build_encoder('nano', tubelet=TUBELET, **fields)


def _init(encoder, video=None):
  video = _video() if video is None else video
  return encoder.init(jax.random.key(0), video)['params']


@pytest.mark.parametrize(
  'name,width,depth,heads,millions',
  [
    ('tiny', 192, 12, 3, 5.6),
    ('small', 384, 12, 6, 21.9),
    ('base', 768, 12, 12, 86.2),
    ('large', 1024, 24, 16, 303.9),
    ('huge', 1280, 32, 16, 631.7),
    ('giant', 1408, 40, 22, 1012.2),
    ('gigantic', 1664, 48, 26, 1843.9),
  ],
)
def test_named_sizes_have_the_published_numbers_of_parameters(
  name, width, depth, heads, millions
):
  encoder = zoo.build_encoder(name)
  assert (encoder.width, encoder.depth, encoder.num_heads) == (
    width,
    depth,
    heads,
  )
  video = jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.uint8)
  params = jax.eval_shape(encoder.init, jax.random.key(0), video)
  count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
  assert count == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
  'name,heads,millions',
  [
    ('large', None, 22.1),
    ('huge', None, 22.3),
    ('giant', 12, 22.4),
  ],
)
def test_predictor_has_the_published_number_of_parameters(
  name, heads, millions
):
  encoder = zoo.build_encoder(name)
  predictor = zoo.build_predictor(encoder, num_heads=heads)
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  context = jax.ShapeDtypeStruct((1, 4, encoder.width), jnp.float32)
  params = jax.eval_shape(
    lambda *a: predictor.init(jax.random.key(0), *a, (8, 14, 14)),
    context,
    ids,
    ids,
  )
  count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
  assert count == pytest.approx(millions, abs=0.06)


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
  params = encoder.init(jax.random.key(0), video)['params']
  features = [
    encoder.apply({'params': params}, x) for x in (doubled, dimmed, video)
  ]
  published = _encoder(pixel_norm='imagenet')
  bright, dark = (
    published.apply({'params': params}, x) for x in (doubled, dimmed)
  )
  change = np.abs(features[0] - features[1]).mean()
  assert change < 0.05 * np.abs(bright - dark).mean()
  # Floats are taken as they are.
  pixels = tubelets.normalize_clips(jnp.asarray(video))
  np.testing.assert_allclose(pixels.mean((1, 2, 3)), 0.0, atol=1e-5)
  np.testing.assert_allclose(
    encoder.apply({'params': params}, pixels), features[2], atol=1e-5
  )


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
  half = positions.make_sincos_table(grid, 16, uniform_power=False)
  # Time has 8 features, height and width 4 each.
  np.testing.assert_allclose(
    half[12, :4], np.sin(10000.0 ** -(np.arange(4) / 4))
  )
  assert (half[12, 8:] == half[0, 8:]).all()


@pytest.mark.parametrize(
  'head_dim,axis_dim',
  [
    (64, 20),
    (80, 26),
    (88, 28),
    (32, 10),
    (24, 8),
    (104, 34),
  ],
)
def test_rope_rotates_the_published_channels(head_dim, axis_dim):
  ids = jnp.array([[0, 63]])
  x = jnp.ones((1, 1, 2, head_dim))
  for style in positions.ROPE_STYLES:
    tables = positions.make_rope_tables(ids, GRID, head_dim, style)
    y = positions.rotate(x, tables)[0, 0]
    np.testing.assert_array_equal(y[0], 1)  # token 0 is at the origin
    turned = np.asarray(y[1]) != 1
    assert turned[: 3 * axis_dim].all() and not turned[3 * axis_dim :].any()


def test_rope_styles_follow_the_published_formulas():
  head_dim, axis_dim = 32, 10
  token = 1 * 16 + 2 * 4 + 3
  x = np.random.default_rng(0).normal(size=head_dim)
  for style in positions.ROPE_STYLES:
    expected = x.copy()
    for axis, position in enumerate((1, 2, 3)):
      for i in range(axis_dim):
        frequency = i % 5 if style == 'tiled' else i // 2
        angle = position * 10000.0 ** (-frequency / 5)
        j = axis * axis_dim + i
        partner = -x[j + 1] if i % 2 == 0 else x[j - 1]
        expected[j] = x[j] * np.cos(angle) + partner * np.sin(angle)
    tables = positions.make_rope_tables(
      jnp.array([[token]]), GRID, head_dim, style
    )
    y = positions.rotate(jnp.asarray(x[None, None, None], jnp.float32), tables)
    np.testing.assert_allclose(y[0, 0, 0], expected, atol=1e-5)


def test_only_interleaved_rope_is_a_rotation():
  x = jax.random.normal(jax.random.key(0), (1, 1, 1, 32))
  for style, is_rotation in (('interleaved', True), ('tiled', False)):
    tables = positions.make_rope_tables(jnp.array([[63]]), GRID, 32, style)
    norm = jnp.linalg.norm(positions.rotate(x, tables)) / jnp.linalg.norm(x)
    assert bool(abs(norm - 1) < 1e-5) == is_rotation


def test_gelu_is_exact():
  x = jnp.linspace(-6, 6, 101)
  expected = jax.nn.gelu(x, approximate=False)
  np.testing.assert_allclose(transformer.gelu(x), expected, atol=1e-6)
  slope = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
  np.testing.assert_allclose(
    jax.vmap(jax.grad(transformer.gelu))(x), slope, atol=1e-6
  )


def test_layer_norm_and_its_gradient_are_flax_s():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(3.0, 2.0, (2, 5, 16)), jnp.float32)
  params = {
    'scale': jnp.asarray(rng.normal(size=16), jnp.float32),
    'bias': jnp.asarray(rng.normal(size=16), jnp.float32),
  }
  reference = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)

  def loss(module):
    return lambda p, x: jnp.sum(jnp.sin(module.apply({'params': p}, x)))

  np.testing.assert_allclose(
    transformer.LayerNorm().apply({'params': params}, x),
    reference.apply({'params': params}, x),
    atol=1e-6,
  )
  actual = jax.grad(loss(transformer.LayerNorm()), (0, 1))(params, x)
  expected = jax.grad(loss(reference), (0, 1))(params, x)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), actual, expected
  )


@pytest.mark.parametrize('kind', encoder_lib.POSITIONS)
def test_encoding_all_ids_equals_encoding_the_clip(kind):
  encoder = _encoder(positions=kind)
  params, video = _init(encoder), _video()
  whole = encoder.apply({'params': params}, video)
  assert whole.shape == (2, 64, 48)
  order = np.random.default_rng(0).permutation(64)
  ids = jnp.broadcast_to(jnp.asarray(order), (2, 64))
  shuffled = encoder.apply({'params': params}, video, ids)
  np.testing.assert_allclose(shuffled, whole[:, order], atol=1e-5)


@pytest.mark.parametrize('kind', encoder_lib.POSITIONS)
def test_context_features_do_not_depend_on_hidden_pixels(kind):
  encoder = _encoder(positions=kind)
  params, video = _init(encoder), _video()
  ids = jnp.broadcast_to(jnp.arange(0, 64, 3), (2, 22))
  seen = encoder.apply({'params': params}, video, ids)
  changed = np.array(tubelets.patchify(jnp.asarray(video), TUBELET))
  hidden = np.setdiff1d(np.arange(64), ids[0])
  changed[:, hidden] = 255 - changed[:, hidden]
  changed = tubelets.unpatchify(jnp.asarray(changed), GRID, TUBELET)
  np.testing.assert_array_equal(
    encoder.apply({'params': params}, changed, ids), seen
  )


@pytest.mark.parametrize('remat', transformer.REMAT_POLICIES)
def test_remat_changes_no_gradient(remat):
  encoder = _encoder(positions='rope_tiled', remat=remat)
  params, video = _init(encoder), _video()

  def loss(encoder, params):
    return jnp.square(encoder.apply({'params': params}, video)).mean()

  actual = jax.grad(lambda p: loss(encoder, p))(params)
  expected = jax.grad(lambda p: loss(_encoder(positions='rope_tiled'), p))(
    params
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected
  )


def test_initialisation_of_v1_and_v2():
  for scaled, std in ((False, 0.02), (True, 0.02), (True, 0.08), (True, 0)):
    encoder = zoo.build_encoder(
      'micro', scale_init_by_depth=scaled, init_std=std
    )
    video = np.zeros((1, 2, 16, 16, 3), np.uint8)
    blocks = encoder.init(jax.random.key(0), video)['params']['transformer'][
      'blocks'
    ]
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
  encoder = _encoder(dtype=jnp.bfloat16)
  params = _init(encoder)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  features = encoder.apply({'params': params}, _video())
  assert features.dtype == jnp.bfloat16
  exact = _encoder().apply({'params': params}, _video())
  np.testing.assert_allclose(features.astype(jnp.float32), exact, atol=0.1)


def test_predictor_sees_context_and_its_own_mask_token():
  encoder = _encoder(positions='rope_tiled')
  predictor = zoo.build_predictor(
    encoder, num_heads=2, width=24, depth=2, num_mask_tokens=2
  )
  context = jax.random.normal(jax.random.key(1), (2, 5, 48))
  ids = jnp.broadcast_to(jnp.arange(12), (2, 12))
  args = (context, ids[:, :5], ids[:, 5:], GRID)
  params = predictor.init(jax.random.key(0), *args)['params']
  assert not params['mask_tokens'].any()
  params['mask_tokens'] = jnp.eye(2, 24)

  def apply(context, mask_index):
    return predictor.apply({'params': params}, context, *args[1:], mask_index)

  out = apply(context, 0)
  assert out.shape == (2, 7, 48)
  assert (apply(context.at[:, 0].add(1.0), 0) != out).any()
  assert (apply(context, 1) != out).any()
  np.testing.assert_array_equal(apply(context, 2), out)  # tokens wrap around


def test_predictor_of_visible_tokens_has_a_head_more():
  encoder = _encoder(positions='rope_tiled')
  fields = dict(num_heads=2, width=24, depth=2)
  plain = zoo.build_predictor(encoder, **fields)
  dense = zoo.build_predictor(encoder, **fields, predict_context=True)
  context = jax.random.normal(jax.random.key(1), (2, 5, 48))
  ids = jnp.broadcast_to(jnp.arange(12), (2, 12))
  args = (context, ids[:, :5], ids[:, 5:], GRID)
  expected, params = (
    model.init(jax.random.key(0), *args)['params'] for model in (plain, dense)
  )
  head = params.pop('proj_context')
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  params['proj_context'] = head
  hidden, visible = dense.apply({'params': params}, *args)
  assert hidden.shape == (2, 7, 48) and visible.shape == (2, 5, 48)
  np.testing.assert_array_equal(
    hidden, plain.apply({'params': expected}, *args)
  )
  # Given specs, a pair of tuples.
  specs = [(x, x) for x in args[:3]]
  both = dense.apply({'params': params}, *specs, GRID)
  assert [len(head) for head in both] == [2, 2]
  np.testing.assert_allclose(both[1][1], visible, atol=1e-5)


def test_attentive_probe_attends_to_all_tokens():
  probe = AttentiveProbe(num_classes=5, num_heads=2)
  features = jax.random.normal(jax.random.key(0), (3, 9, 48))
  params = probe.init(jax.random.key(1), features)['params']
  logits = probe.apply({'params': params}, features)
  assert logits.shape == (3, 5)
  # The order of the tokens does not matter, their content does.
  np.testing.assert_allclose(
    probe.apply({'params': params}, features[:, ::-1]), logits, atol=1e-5
  )
  other = probe.apply({'params': params}, features.at[:, 8].add(1.0))
  assert (other != logits).any()


def test_attention_of_a_probe_is_what_its_query_gathers():
  probe = AttentiveProbe(5, num_heads=1, depth=1, output_projection=False)
  features = jax.random.normal(jax.random.key(0), (3, 9, 48))
  params = probe.init(jax.random.key(1), features)['params']
  params['query'] *= 50.0  # something to look for
  params['key_proj']['kernel'] *= 50.0
  attention = compute_attention(probe, params, features)
  assert attention.shape == (3, 9) and attention.max() > 0.15
  np.testing.assert_allclose(attention.sum(axis=1), 1.0, atol=1e-5)
  _, captured = probe.apply(
    {'params': params},
    features,
    capture_intermediates=True,
    mutable='intermediates',
  )
  outputs = {
    k: v['__call__']
    for k, v in captured['intermediates'].items()
    if '__call__' in v
  }
  gathered = params['query'] + attention[:, None] @ outputs['value_proj'][0]
  gathered -= gathered.mean(axis=-1, keepdims=True)
  gathered /= np.sqrt((gathered**2).mean(axis=-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(gathered, outputs['norm2'][0], atol=1e-4)


@pytest.mark.parametrize(
  'make,message',
  [
    (lambda: zoo.build_encoder('enormous'), "'enormous' is not one of"),
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
    (
      lambda: positions.make_rope_tables(jnp.zeros((1, 1), int), GRID, 24, 'x'),
      "RoPE style 'x'",
    ),
  ],
)
def test_errors_name_the_thing_and_what_exists(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def _drop_path_model(rate):
  return transformer.Transformer(3, 2, 32, drop_path_rate=rate)


@pytest.fixture(scope='module')
def drop_path_params():
  """Of three blocks whose perceptrons add nothing."""
  init = jax.jit(_drop_path_model(0.0).init)
  params = init(jax.random.key(0), jnp.ones((1, 2, 16)))
  mlp = params['params']['blocks']['mlp']
  mlp['fc2'] = jax.tree.map(jnp.zeros_like, mlp['fc2'])
  return params


@pytest.mark.parametrize('active,rate', [(0, 0.0), (1, 0.4), (2, 0.8)])
def test_drop_path_grows_with_depth_and_keeps_the_mean(
  drop_path_params, active, rate
):
  # One block adds something, so that what is dropped can be told.
  params = jax.tree.map(jnp.copy, drop_path_params)
  attention = params['params']['blocks']['attention']
  only = (jnp.arange(3) == active).reshape(3, 1, 1, 1)
  attention['out_kernel'] *= jnp.where(only, 50.0, 0.0)
  x = jnp.broadcast_to(
    jax.random.normal(jax.random.key(1), (1, 2, 16)), (4096, 2, 16)
  )
  apply = jax.jit(_drop_path_model(0.8).apply)
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


def test_outputs_of_several_layers_are_those_of_shallower_encoders():
  encoder = zoo.build_encoder(
    'mini', tubelet=(2, 8, 8), positions='rope_interleaved'
  )
  video = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3), np.uint8)
  params = encoder.init(jax.random.key(0), video)['params']
  outputs = encoder.apply({'params': params}, video, layers=(0, 2))
  assert outputs.shape == (2, 2, 8, 128)
  for place, layer in enumerate((0, 2)):
    shallow = encoder.clone(depth=layer + 1)
    blocks = params['transformer']['blocks']
    cut = params | {
      'transformer': {
        'blocks': jax.tree.map(lambda x, n=layer + 1: x[:n], blocks)
      }
    }
    expected = shallow.apply({'params': cut}, video)
    np.testing.assert_allclose(outputs[:, place], expected, atol=1e-5)
  with pytest.raises(ValueError, match='encoder with 4 blocks: name some of 0'):
    encoder.apply({'params': params}, video, layers=(2, 4))
