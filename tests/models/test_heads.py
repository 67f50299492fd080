"""What goes on top of an encoder: the predictor and the attentive probe."""

import functools

import chex
import jax
import jax.numpy as jnp
import nano
import numpy as np

from vjepa_jax.models import zoo
from vjepa_jax.models.probe import AttentiveProbe, compute_attention


def test_predictor_of_hidden_tokens_and_of_visible_ones():
  fields = dict(num_heads=2, width=24, depth=2, num_mask_tokens=2)
  encoder = nano.build_encoder(positions='rope_tiled')
  plain, dense = (
    zoo.build_predictor(encoder, **fields, predict_context=both)
    for both in (False, True)
  )
  context = jax.random.normal(jax.random.key(1), (2, 5, 48))
  ids = jnp.tile(jnp.arange(12), (2, 1))
  args = context, ids[:, :5], ids[:, 5:], nano.GRID
  expected, params = (
    model.init(jax.random.key(0), *args)['params'] for model in (plain, dense)
  )
  assert not params['mask_tokens'].any()
  head = params.pop('proj_context')
  chex.assert_trees_all_equal(params, expected)
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
  both = dense.apply({'params': params}, *specs, nano.GRID)
  _, second = zip(*both, strict=True)
  chex.assert_trees_all_close(second, apply(context, 1), atol=1e-5)


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
