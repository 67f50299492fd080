"""What is read from compiled programs and traced ones."""

# Lines of the compiler are as long as they are.
# ruff: noqa: E501

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from vjepa_jax.compilation import flops, hlo
from vjepa_jax.models import zoo
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.parallel.sharding import replicate, shard_batch
from vjepa_jax.training.objectives.targets import FeatureTargets
from vjepa_jax.training.objectives.vjepa import VJepa
from vjepa_jax.training.state import init_state
from vjepa_jax.training.step import differentiate

pytestmark = pytest.mark.usefixtures('optimized')

_MODULE = """HloModule jit_step

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kOutput, calls=%inner, metadata={op_name="jit(step)/transpose(jvp(predictor))/while/body/dot"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %all-reduce.1 = (bf16[4,128]{1,0:T(8,128)(2,1)}, f32[2]{0:T(128)}) all-reduce(%a, %b), replica_groups={}, to_apply=%sum, metadata={op_name="jit(step)/transpose(jvp(predictor))/psum"}
  ROOT %t = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%p, %fusion.1)
}

%inner (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %scatter.1 = f32[8,128]{1,0:T(8,128)} scatter(%p, %p, %p), backend_config={"window_config":{"estimated_cycles":"7"}}
}

%condition (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %constant.2 = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%p, %constant.2), direction=LT
}

ENTRY %main (p: (s32[], f32[8,128])) -> f32[8,128] {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %while.1 = (s32[], f32[8,128]{1,0:T(8,128)}) while(%p), condition=%condition, body=%body
  %all-gather-start.1 = (bf16[16]{0}, bf16[128]{0}) all-gather-start(%p), metadata={op_name="jit(step)/jvp(target_encoder)/gather"}
  %all-gather-done.1 = bf16[128]{0} all-gather-done(%all-gather-start.1)
  ROOT %copy.1 = f32[8,128]{1,0:T(8,128)} copy(%while.1), metadata={op_name="jit(step)/optimizer/mul"}, backend_config={"window_config":{"estimated_cycles":"30"}}
}
"""


def test_a_program_is_weighed_by_the_trips_of_its_loops():
  # A fusion's cycles cover what is inside of it.
  assert hlo.estimate_cycles(_MODULE) == {
    'predictor_backward': 1200,
    'optimizer': 30,
  }
  # Scatters inside of fusions are counted, halves of a collective once.
  assert hlo.count_scatters(_MODULE) == 1
  assert hlo.count_collectives(_MODULE) == {
    'all-gather:bf16': {'count': 1, 'mib': 0.0},
    'all-reduce:bf16': {'count': 12, 'mib': 0.01},
    'all-reduce:f32': {'count': 12, 'mib': 0.0},
  }


def test_collectives_that_xla_tpu_fuses_are_counted_once():
  text = Path(__file__).with_name('fsdp_v5e.hlo').read_text()
  counts = hlo.count_collectives(text)
  # Kernels of 4 layers, six of 24 MiB in bfloat16 each: gathered forward and
  # backward, most of them in starts, steps and ends; and the embedding's.
  assert counts['all-gather:bf16'] == {'count': 49, 'mib': 2 * 96 + 3}
  # Their gradients in float32, as 'all-reduce-scatter' fusions.
  assert counts['reduce-scatter:f32'] == {'count': 25, 'mib': 192 + 6}
  # The eighth that is left of these is summed over the groups.
  assert counts['all-reduce:f32']['mib'] == pytest.approx(198 / 8, rel=0.01)


def test_scopes_name_the_part_of_the_step():
  for scope, part in {
    'jvp(target_encoder)/Encoder/dot': 'target_encoder',
    'jvp(context_encoder)/Encoder/dot': 'context_encoder',
    'transpose(jvp(context_encoder))/dot': 'context_encoder_backward',
    'ema/add': 'ema',
    '': 'other',
  }.items():
    assert hlo.get_part(f'jit(step)/{scope}') == part


def test_collectives_of_a_real_program():
  mesh = make_mesh(1, jax.devices()[:4])
  rows, whole = shard_batch(mesh), replicate(mesh)

  def step(w, x):
    def body(x, _):
      # One sum over the devices in each of five trips.
      return x + (x.sum(axis=0) @ w), None

    return jax.lax.scan(body, x, None, length=5)[0]

  w = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=whole)
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)
  compiled = jax.jit(step, out_shardings=rows).lower(w, x).compile()
  counts = hlo.count_collectives(compiled.as_text())
  assert counts['all-reduce:f32']['count'] == 5


def test_flops_of_loops_branches_and_gradients():
  x, w = jnp.zeros((4, 8)), jnp.zeros((8, 8))
  product = 2 * 4 * 8 * 8

  def repeat(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]

  def count(f, *args):
    return flops.count_flops(jax.jit(f).trace(*args).jaxpr)

  assert count(repeat, x, w) == (3 * product, 0)
  # Forward, and backward two products each.
  assert count(jax.grad(lambda w: repeat(x, w).sum()), w) == (9 * product, 0)

  def branch(x, w):
    return jax.lax.cond(True, lambda: x @ w, lambda: x)

  assert count(branch, x, w) == (product, 0)


def _count_blocks(lengths, model, mlp_dim):
  """One forward pass of transformer blocks over several sequences."""
  linear = sum(lengths) * model.width * (4 * model.width + 2 * mlp_dim)
  return model.depth * (linear + sum(2 * n * n * model.width for n in lengths))


def test_a_step_multiplies_what_the_method_needs():
  encoder = zoo.build_encoder('nano', tubelet=(2, 8, 8))
  predictor = zoo.build_predictor(encoder, num_heads=2, width=24, depth=3)
  objective = VJepa(encoder, predictor, FeatureTargets(encoder), ('a', 'b'))

  def ids(n):
    return jax.ShapeDtypeStruct((3, n), jnp.int32)

  masks = (
    {'context': ids(20), 'target': ids(30)},
    {'context': ids(10), 'target': ids(40)},
  )
  video = jax.ShapeDtypeStruct((3, 8, 32, 32, 3), jnp.uint8)
  state = jax.eval_shape(
    functools.partial(init_state, objective, optax.identity()),
    jax.random.key(0),
  )
  step = jax.jit(functools.partial(differentiate, objective))
  traced = step.trace(state, {'video': {'pixels': video, 'masks': masks}})
  # A pass over all tokens; three over the context, but pixels need no gradient;
  # three of the predictor.
  pixels = 2 * 8 * 8 * 3
  needed = (
    64 * pixels * encoder.width
    + _count_blocks([64], encoder, encoder.mlp_dim)
    + 2 * 30 * pixels * encoder.width
    + 3 * _count_blocks([20, 10], encoder, encoder.mlp_dim)
    + 3 * (30 + 70) * encoder.width * predictor.width
    + 3 * _count_blocks([50, 50], predictor, 4 * predictor.width)
  )
  assert flops.count_flops(traced.jaxpr) == (2 * 3 * needed, 0)


def test_flops_of_kernels_are_counted_by_their_grid():
  from vjepa_jax.models.tpu_attention import attend_lanes

  qkv = jnp.zeros((2, 32, 3 * 256))
  attend = jax.jit(lambda *a: attend_lanes(*a, (32,), 64, 0.125))
  traced = attend.trace(qkv, jnp.zeros((1, 3 * 256)))
  # Two products for each head, all 128 lanes wide.
  assert flops.count_flops(traced.jaxpr) == (0, 2 * 4 * 2 * 2 * 32 * 32 * 128)


def test_flops_of_cudnn_attention_are_counted():
  # Its primitives cannot be traced without the library.
  from types import SimpleNamespace

  q = SimpleNamespace(aval=jax.ShapeDtypeStruct((2, 32, 4, 16), jnp.bfloat16))
  equations = [
    SimpleNamespace(
      primitive=SimpleNamespace(name=f'dot_product_attention_{way}_wrapper'),
      params={},
      invars=[q, q, q],
    )
    for way in ('fwd', 'bwd')
  ]
  count = flops._count(SimpleNamespace(eqns=equations))
  assert tuple(count) == (0, (2 + 5) * 2 * 2 * 4 * 32 * 32 * 16)
