"""The parts of blocks, and what a stack of them makes of its options."""

import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from vjepa_jax.models import transformer, zoo


def test_gelu_is_exact():
  x = jnp.linspace(-6, 6, 101)
  exact = functools.partial(jax.nn.gelu, approximate=False)
  for make in (lambda f: f, lambda f: jax.vmap(jax.grad(f))):
    actual, expected = make(transformer.gelu)(x), make(exact)(x)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_layer_norm_and_its_gradient_are_flax_s():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(3.0, 2.0, (2, 3, 5, 16)), jnp.float32)
  params = {
    name: jnp.asarray(rng.normal(size=16), jnp.float32)
    for name in ('scale', 'bias')
  }

  def run(module):
    out, pull = jax.vjp(
      lambda *a: module.apply({'params': a[0]}, a[1]), params, x
    )
    return out, pull(jnp.sin(out))

  reference = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
  actual, expected = run(transformer.LayerNorm()), run(reference)
  chex.assert_trees_all_close(actual, expected, atol=2e-5)


def test_remat_changes_no_gradient():
  video = nano.make_video()

  @functools.partial(jax.jit, static_argnums=0)
  def differentiate(encoder, params):
    loss = jax.grad(lambda p: jnp.square(encoder.apply(p, video)).mean())
    return loss(params)

  encoder = nano.build_encoder(positions='rope_tiled')
  params = nano.init(encoder)
  expected = differentiate(encoder, params)
  for remat in {*transformer.REMAT_POLICIES} - {'none'}:
    actual = differentiate(encoder.clone(remat=remat), params)
    chex.assert_trees_all_close(actual, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')
def test_remat_keeps_what_it_says():
  model = transformer.Transformer(depth=4, num_heads=4, mlp_dim=512)
  x = jax.ShapeDtypeStruct((8, 64, 128), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), x)
  sizes = {}
  for remat in transformer.REMAT_POLICIES:
    apply = model.clone(remat=remat).apply
    loss = jax.jit(jax.grad(lambda p, x, apply=apply: apply(p, x).sum()))
    memory = loss.lower(params, x).compile().memory_analysis()
    sizes[remat] = memory.temp_size_in_bytes / 2**20
  assert sizes['full'] < sizes['attention'] < sizes['dots'] < sizes['none']
  # Of each of 4 blocks at least the 512 hidden features of every token.
  assert sizes['dots'] - sizes['full'] > 4 * 8 * 64 * 512 * 4 / 2**20


@pytest.mark.parametrize('scaled,std', [(False, 0.02), (True, 0.08), (True, 0)])
def test_initialisation_of_v1_and_v2(scaled, std):
  video = np.zeros((1, 2, 16, 16, 3), np.uint8)
  encoder = zoo.build_encoder('micro', scale_init_by_depth=scaled, init_std=std)
  blocks = nano.init(encoder, video)['params']['transformer']['blocks']
  query = blocks['attention']['query']
  for kernel in (
    blocks['mlp']['fc2']['kernel'],
    blocks['attention']['out_kernel'],
  ):
    for layer in range(encoder.depth):
      expected = std or np.prod(kernel.shape[1:-1]) ** -0.5
      expected /= np.sqrt(2 * (layer + 1)) if scaled else 1
      assert float(kernel[layer].std()) == pytest.approx(expected, rel=0.03)
  expected = std or encoder.width**-0.5
  assert float(query['kernel'].std()) == pytest.approx(expected, rel=0.03)
  assert not query['bias'].any()
  # Layers differ from each other.
  assert (query['kernel'][0] != query['kernel'][1]).all()


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
  video = nano.make_video()
  params = jax.eval_shape(lambda: nano.init(nano.build_encoder()))

  def run(rate, *rngs):
    def apply(params, key):
      encoder = nano.build_encoder(drop_path_rate=rate)
      return encoder.apply(params, video, rngs=dict.fromkeys(rngs, key))

    return jax.jit(apply).lower(params, jax.random.key(0)).as_text()

  assert run(0.5) == run(0.0) == run(0.0, 'drop_path') != run(0.5, 'drop_path')
