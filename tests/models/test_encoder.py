"""Encoders: tubelets, sizes, what features depend on."""

import functools

import chex
import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from vjepa_jax.models import positions, tubelets, zoo
from vjepa_jax.models.attention_mask import block_causal
from vjepa_jax.models.tpu_attention import attend_lanes


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
  video = nano.make_video((1, 4, 16, 24, 3))
  tokens = tubelets.patchify(jnp.asarray(video), nano.TUBELET)
  assert tokens.shape == (1, 2 * 2 * 3, 2 * 8 * 8 * 3)
  # Token (t, h, w) = (1, 0, 2).
  expected = video[0, 2:4, 0:8, 16:24].reshape(-1)
  np.testing.assert_array_equal(tokens[0, 1 * 6 + 2], expected)
  back = tubelets.unpatchify(tokens, (2, 2, 3), nano.TUBELET)
  np.testing.assert_array_equal(back, video)


def test_embedding_is_the_published_strided_convolution():
  video = nano.make_video((1, 4, 16, 16, 3))
  embed = tubelets.TubeletEmbed(5)
  tokens = tubelets.patchify(jnp.asarray(video), nano.TUBELET)
  params = embed.init(jax.random.key(0), tokens)
  pixels = (video - np.array(tubelets.PIXEL_MEAN)) / tubelets.PIXEL_STD
  expected = jax.lax.conv_general_dilated(
    pixels.astype(np.float32),
    params['params']['proj']['kernel'].reshape(*nano.TUBELET, 3, 5),
    nano.TUBELET,
    'VALID',
    dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
  ).reshape(1, -1, 5)
  np.testing.assert_allclose(embed.apply(params, tokens), expected, atol=1e-5)


def test_clips_normalised_by_themselves_ignore_brightness_and_contrast():
  video = nano.make_video((2, 4, 16, 16, 3))
  dimmed = (video // 2 + np.array([10, 30, 5])).astype(np.uint8)
  doubled = (video // 2 * 2).astype(np.uint8)
  encoder = nano.build_encoder(pixel_norm='clip')
  params = nano.init(encoder, video)
  apply = jax.jit(encoder.apply)
  features = [apply(params, x) for x in (doubled, dimmed, video)]
  published = jax.jit(nano.build_encoder(pixel_norm='imagenet').apply)
  bright, dark = (published(params, x) for x in (doubled, dimmed))
  change = np.abs(features[0] - features[1]).mean()
  assert change < 0.05 * np.abs(bright - dark).mean()
  # Floats are taken as they are.
  pixels = tubelets.normalize_clips(jnp.asarray(video))
  np.testing.assert_allclose(pixels.mean((1, 2, 3)), 0.0, atol=1e-5)
  np.testing.assert_allclose(apply(params, pixels), features[2], atol=1e-5)


@pytest.mark.parametrize('kind', positions.POSITIONS)
def test_tokens_depend_on_visible_pixels_and_on_no_order(kind):
  encoder, video = nano.build_encoder(positions=kind), nano.make_video()
  params, apply = nano.init(encoder), jax.jit(encoder.apply)
  whole = apply(params, video)
  assert whole.shape == (2, 64, 48)
  order = np.random.default_rng(0).permutation(64)
  shuffled = apply(params, video, jnp.tile(order, (2, 1)))
  np.testing.assert_allclose(shuffled, whole[:, order], atol=1e-5)
  ids = jnp.tile(jnp.arange(0, 64, 3), (2, 1))
  changed = np.array(tubelets.patchify(jnp.asarray(video), nano.TUBELET))
  hidden = np.setdiff1d(np.arange(64), ids[0])
  changed[:, hidden] = 255 - changed[:, hidden]
  changed = tubelets.unpatchify(jnp.asarray(changed), nano.GRID, nano.TUBELET)
  np.testing.assert_array_equal(
    apply(params, changed, ids), apply(params, video, ids)
  )


def test_images_and_clips_of_other_sizes():
  encoder = nano.build_encoder()
  params = nano.init(encoder)
  image = nano.make_video((2, 32, 32, 3))
  features = encoder.apply(params, image)
  assert features.shape == (2, 16, 48)
  still = encoder.apply(params, np.repeat(image[:, None], 2, axis=1))
  np.testing.assert_allclose(features, still, atol=1e-5)
  wide = encoder.apply(params, nano.make_video((1, 16, 24, 40, 3)))
  assert wide.shape == (1, 8 * 3 * 5, 48)


def test_bfloat16_compute_keeps_float32_parameters():
  encoder, exact = nano.build_encoder(dtype=jnp.bfloat16), nano.build_encoder()
  params = nano.init(encoder)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  features, expected = (
    jax.jit(e.apply)(params, nano.make_video()) for e in (encoder, exact)
  )
  assert features.dtype == jnp.bfloat16
  np.testing.assert_allclose(features.astype(jnp.float32), expected, atol=0.1)


@pytest.fixture(scope='module')
def deep():
  """An encoder of four blocks, its parameters and a clip."""
  encoder = zoo.build_encoder(
    'mini',
    tubelet=nano.TUBELET,
    positions='rope_interleaved',
    remat='full',
    init_std=0.0,
  )
  video = nano.make_video((2, 4, 16, 16, 3))
  return encoder, nano.init(encoder, video), video


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
  chex.assert_trees_all_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_outputs_of_layers_that_are_not_wanted_are_not_kept(deep):
  encoder, params, video = deep
  jaxpr = jax.make_jaxpr(lambda p: encoder.apply(p, video, layers=(1,)))(params)
  assert 'f32[2,8,128]' in str(jaxpr)
  assert 'f32[4,2,8,128]' not in str(jaxpr)
  # Nor are those that are wanted passed through in every block.
  assert 'f32[2,8,128] = select_n' not in str(jaxpr)
  with pytest.raises(ValueError, match='encoder with 4 blocks: name some of 0'):
    encoder.apply(params, video, layers=(2, 4))


def test_levels_of_a_named_size_are_published_or_the_ends_of_quarters():
  for size, levels in (
    ('gigantic', (11, 23, 37, 47)),
    ('huge', (7, 15, 23, 31)),
    ('micro', (1, 2, 4, 5)),
    ('nano', (0, 1)),
  ):
    assert zoo.build_encoder(size, levels=True).levels == levels
  for depth, levels in zoo.LEVELS.items():
    assert zoo.get_levels(depth) == levels
  assert zoo.build_encoder('nano').levels == ()


def _run(video=None, coordinates=None, **fields):
  video = nano.make_video() if video is None else video
  encoder = nano.build_encoder(**fields)
  return encoder.init(jax.random.key(0), video, coordinates=coordinates)


@pytest.mark.parametrize(
  'make,message',
  [
    (lambda: zoo.build_encoder('enormous'), "size 'enormous' is not one of"),
    (lambda: _run(positions='learned'), "positions 'learned' is not one"),
    (lambda: _run(pixel_norm='x'), "pixel_norm 'x' is not one of"),
    (lambda: _run(remat='some'), "remat 'some' is not one of"),
    (lambda: _run(attention='flash'), "'flash' is not one of"),
    (
      lambda: _run(nano.make_video((1, 8, 30, 32, 3))),
      'height of the clip, 30, is not a multiple of the tubelet, 8',
    ),
    (
      lambda: zoo.build_predictor(nano.build_encoder(), num_heads=5, width=24),
      'width 24 is not divisible by its 5 heads',
    ),
    (
      lambda: positions.make_rope_tables(jnp.zeros((1, 1, 3)), 24, 'x'),
      "RoPE style 'x'",
    ),
    (
      lambda: _run(coordinates=jnp.zeros((64, 3))),
      "positions 'sincos' have no coordinates",
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
