"""AdamW with the published exclusions, Muon on stacked layers, clipping."""

import chex
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from vjepa_jax.training import optimizer

RATES = {'learning_rate': 1e-3, 'weight_decay': 0.04}


@pytest.fixture(scope='module')
def params():
  return small.init(small.build()).params


def _randomize(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), tree
  )


def _update(kind, params, grads):
  tx = optimizer.make_optimizer(kind=kind)
  return jax.jit(lambda p, g: tx.update(g, tx.init(p), p, **RATES)[0])(
    params, grads
  )


def test_adamw_has_the_published_exclusions(params):
  grads = _randomize(params, 0)
  tx = optax.adamw(1e-3, weight_decay=0.04, mask=optimizer.mask_decayed)
  expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  actual = _update('adamw', params, grads)
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-8)
  decays = flatten_dict(optimizer.mask_decayed(params), sep='/')
  excluded = {name for name, decayed in decays.items() if not decayed}
  assert 'encoder/norm/scale' in excluded
  assert 'encoder/transformer/blocks/attention/query/bias' in excluded
  assert 'encoder/transformer/blocks/attention/out_bias' in excluded
  assert 'predictor/mask_tokens' not in excluded
  assert all(n.endswith(('bias', 'scale')) for n in excluded)


def test_muon_of_a_stack_is_muon_of_its_layers(params):
  stacked = params['encoder']['transformer']['blocks']
  grads = _randomize(stacked, 1)

  def unstack(tree):
    return {
      f'block_{i}': jax.tree.map(lambda x, i=i: x[i], tree) for i in range(2)
    }

  together = _update('muon', {'blocks': stacked}, {'blocks': grads})
  alone = _update('muon', unstack(stacked), unstack(grads))
  together = unstack(together['blocks'])
  chex.assert_trees_all_close(together, alone, atol=1e-7)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw(params):
  grads = _randomize(params, 2)
  muon, adamw = (_update(kind, params, grads) for kind in ('muon', 'adamw'))
  muon, adamw, flat = (flatten_dict(x, sep='/') for x in (muon, adamw, params))
  matrices = [n for n in muon if 'blocks' in n and n.endswith('kernel')]
  assert len(matrices) == 2 * 6
  for name in muon.keys() - matrices:
    np.testing.assert_allclose(muon[name], adamw[name], atol=1e-9)
  for name in matrices:
    for layer in np.asarray(muon[name] + 4e-5 * flat[name]) / -1e-3:
      axis = 2 if 'out_kernel' in name else 1  # where outputs start
      matrix = layer.reshape(int(np.prod(layer.shape[:axis])), -1)
      # Newton-Schulz leaves them around 1; .2 sqrt(side) is Adam's size.
      values = np.linalg.svd(matrix, compute_uv=False)
      values /= 0.2 * max(matrix.shape) ** 0.5
      assert np.quantile(values, 0.1) > 0.5 and values.max() < 1.4, name


def test_modules_are_clipped_separately():
  grads = {'encoder': jnp.full(4, 10.0), 'predictor': jnp.full(4, 0.1)}
  clipped, norms = optimizer.clip_by_module(grads, 10.0)
  assert float(norms['encoder']) == pytest.approx(20.0)
  np.testing.assert_allclose(clipped['encoder'], 5.0, rtol=1e-6)
  np.testing.assert_array_equal(clipped['predictor'], grads['predictor'])
