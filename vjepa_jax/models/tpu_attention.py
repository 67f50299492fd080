"""Attention for TPUs whose heads stay where the projections put them.

A TPU moves data in rows of 128 lanes. Kernels that take `[B, heads, N, d]` pad
every head to 128 lanes, in memory too: four times the predictor's 32-wide
heads, with a transpose before and after. Here queries, keys and values stay
side by side in `[B, N, channels]`. One program takes 128 lanes of each, that
is a few heads, and picks a head by zeroing the lanes of the others in one
operand of each matmul, which is free: the systolic array is 128 wide anyway.

A whole row of scores fits on the chip at the lengths of pretraining, so the
backward pass makes the softmax anew and nothing is saved but the inputs.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from vjepa_jax.models.attention_mask import FULL, Mask
from vjepa_jax.models.positions import Rope

LANES = 128
# Sequences start at multiples of this many rows.
SUBLANES = 8
# The longest sequence whose scores are kept on the chip.
MAX_LENGTH = 2560
# Queries whose scores are made at a time.
_CHUNK = 256
_VMEM_BYTES = 64 * 2**20


def get_head_slot(head_dim: int) -> int | None:
  """Returns the lanes that a head takes, with zeros behind it; None if > 128.

  A slot divides 128, so that no head lies across two rows of lanes.
  """
  return next((n for n in (8, 16, 32, 64, 128) if n >= head_dim), None)


def attend_lanes(
  qkv: jax.Array,
  bias: jax.Array,
  lengths: tuple[int, ...],
  slot: int,
  scale: float,
  rope: Rope | None = None,
  mask: Mask = FULL,
  interpret: bool = False,
) -> jax.Array:
  """Computes `softmax(q k^T * scale) v` within each of several sequences.

  Args:
    qkv: `[B, N, 3 * C]`, C a multiple of 128: for each 128 channels of the
      heads the queries, then the keys, then the values.
    bias: `[1, 3 * C]`, float32, to be added to `qkv`: the sum of its gradient
      over the tokens is cheaper here than after.
    lengths: Tokens of each sequence, multiples of 8, end to end; their sum is
      N. No token sees another sequence.
    slot: Channels of a head, a divisor of 128.
    scale: Factor of the scores.
    rope: Cosines and sines `[B or 1, N, 128]`, float32, by which queries and
      keys are turned, see `positions.rotate`.
    mask: What a token sees of its sequence; there is only `FULL`.
    interpret: Run on any platform, slowly.

  Returns:
    `[B, N, C]` in the dtype of `qkv`; the softmax is in float32.

  Raises:
    ValueError: Another mask.
  """
  if mask != FULL:
    raise ValueError(f'attend_lanes has no {mask} mask: take attention.attend')
  return _attend(qkv, bias, rope, lengths, slot, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _attend(qkv, bias, rope, lengths, slot, scale, interpret):
  batch, num_tokens, channels = qkv.shape
  kernel = functools.partial(_forward, lengths=lengths, slot=slot, scale=scale)
  out = jax.ShapeDtypeStruct((batch, num_tokens, channels // 3), qkv.dtype)
  scratch = (pltpu.VMEM((max(lengths), LANES), qkv.dtype),) * 2
  return _call(
    'attend_forward', kernel, (qkv, bias), rope, (out,), scratch, interpret
  )[0]


def _attend_forward(qkv, bias, rope, lengths, slot, scale, interpret):
  out = _attend(qkv, bias, rope, lengths, slot, scale, interpret)
  return out, (qkv, bias, rope)


def _attend_backward(lengths, slot, scale, interpret, saved, gradient):
  qkv, bias, rope = saved
  kernel = functools.partial(_backward, lengths=lengths, slot=slot, scale=scale)
  outs = (
    jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
    jax.ShapeDtypeStruct((qkv.shape[0], *bias.shape), jnp.float32),
  )
  rows = pltpu.VMEM((max(lengths), LANES), qkv.dtype)
  sums = pltpu.VMEM((max(lengths), LANES), jnp.float32)
  d_qkv, d_bias = _call(
    'attend_backward',
    kernel,
    (qkv, bias, gradient),
    rope,
    outs,
    (rows, rows, sums, sums),
    interpret,
  )
  return d_qkv, d_bias.sum(axis=0), jax.tree.map(jnp.zeros_like, rope)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(name, kernel, inputs, rope, outs, scratch, interpret):
  """Runs a kernel for each clip and each 128 channels of the heads."""
  batch, num_tokens, channels = inputs[0].shape

  def spec(x):
    # Of what has queries, keys and values side by side, three times 128.
    lanes = LANES * x.shape[-1] // (channels // 3)
    if x.ndim == 2:
      return pl.BlockSpec((1, lanes), lambda b, i: (0, i))
    return pl.BlockSpec((1, x.shape[1], lanes), lambda b, i: (b, 0, i))

  in_specs = [spec(x) for x in inputs]
  if rope is not None:
    # The same block for all heads, and for all clips where they share it: it
    # is not fetched again.
    shared = rope[0].shape[0] == 1
    table = pl.BlockSpec(
      (1, num_tokens, LANES), lambda b, i: (0 if shared else b, 0, 0)
    )
    inputs, in_specs = [*inputs, *rope], [*in_specs, table, table]
  return pl.pallas_call(
    kernel,
    grid=(batch, channels // (3 * LANES)),
    in_specs=in_specs,
    out_specs=[spec(x) for x in outs],
    out_shape=outs,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'),
      vmem_limit_bytes=_VMEM_BYTES,
    ),
    interpret=interpret,
    name=name,
  )(*inputs)


def _forward(qkv_ref, bias_ref, *refs, lengths, slot, scale):
  """Kernel: [1, N, 384] and tables [1, N, 128], if any, to [1, N, 128]."""
  *tables, out_ref, keys_ref, values_ref = refs
  load = functools.partial(_load, qkv_ref, bias_ref)
  masks = _make_head_masks(slot)
  start = 0
  for length in lengths:
    rows = pl.ds(start, length)
    keys_ref[:length] = load(rows, _KEYS, tables)
    values_ref[:length] = load(rows, _VALUES)

    def attend_chunk(chunk, length=length):
      q = load(chunk, _QUERIES, tables)
      k, v = keys_ref[:length], values_ref[:length]
      out = jnp.zeros((q.shape[0], LANES), jnp.float32)
      for mask in masks:
        scores = _dot(_pick(mask, q), k, 1, 1) * scale  # [queries, keys]
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        total = weights.sum(axis=1, keepdims=True)
        out += _dot(weights.astype(v.dtype), _pick(mask, v), 1, 0) / total
      out_ref[0, chunk] = out.astype(out_ref.dtype)

    _for_chunks(start, length, attend_chunk)
    start += length


def _backward(qkv_ref, bias_ref, g_ref, *refs, lengths, slot, scale):
  """Kernel: [1, N, 384], gradient and tables [1, N, 128] to [1, N, 384]."""
  *tables, out_ref, d_bias_ref, keys_ref, values_ref, dk_ref, dv_ref = refs
  load = functools.partial(_load, qkv_ref, bias_ref)
  store = functools.partial(_store, out_ref, d_bias_ref)
  masks = _make_head_masks(slot)
  d_bias_ref[...] = jnp.zeros_like(d_bias_ref)
  start = 0
  for length in lengths:
    rows = pl.ds(start, length)
    keys_ref[:length] = load(rows, _KEYS, tables)
    values_ref[:length] = load(rows, _VALUES)
    dk_ref[:length] = jnp.zeros((length, LANES), jnp.float32)
    dv_ref[:length] = jnp.zeros((length, LANES), jnp.float32)

    def differentiate_chunk(chunk, length=length):
      q, g = load(chunk, _QUERIES, tables), g_ref[0, chunk]
      k, v = keys_ref[:length], values_ref[:length]
      dq = jnp.zeros((q.shape[0], LANES), jnp.float32)
      for mask in masks:
        q_head, g_head = _pick(mask, q), _pick(mask, g)
        # Keys along the rows: sums over them are cheap, and of the five
        # matmuls only that of dq takes a transposed operand.
        scores = _dot(k, q_head, 1, 1) * scale  # [keys, queries]
        weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
        weights *= 1.0 / weights.sum(axis=0, keepdims=True)
        d_weights = _dot(v, g_head, 1, 1)
        delta = (weights * d_weights).sum(axis=0, keepdims=True)
        d_scores = (weights * (d_weights - delta) * scale).astype(q.dtype)
        dv_ref[:length] += _dot(weights.astype(q.dtype), g_head, 1, 0)
        dk_ref[:length] += _dot(d_scores, q_head, 1, 0)
        dq += _dot(d_scores, _pick(mask, k), 0, 0)
      store(chunk, _QUERIES, dq, tables)

    _for_chunks(start, length, differentiate_chunk)
    store(rows, _KEYS, dk_ref[:length], tables)
    store(rows, _VALUES, dv_ref[:length])
    start += length


_QUERIES, _KEYS, _VALUES = (pl.ds(i * LANES, LANES) for i in range(3))


def _load(ref, bias_ref, rows, columns, tables=()):
  """Reads rows with their bias, turned by the tables if there are any."""
  x = ref[0, rows, columns].astype(jnp.float32) + bias_ref[:, columns]
  if tables:
    cos, sin = (table[0, rows] for table in tables)
    x = x * cos + _swap_pairs(x) * sin
  return x.astype(ref.dtype)


def _store(ref, bias_ref, rows, columns, gradient, tables=()):
  """Writes the gradient of what `_load` reads: its transpose."""
  if tables:
    cos, sin = (table[0, rows] for table in tables)
    gradient = gradient * cos - _swap_pairs(gradient * sin)
  ref[0, rows, columns] = gradient.astype(ref.dtype)
  bias_ref[0, :, columns] += gradient.sum(axis=0, keepdims=True)


def _swap_pairs(x):
  """Maps channels (a, b) to (-b, a) for each pair of `[N, 128]`."""
  even = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
  return jnp.where(even, -pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1))


def _dot(a, b, a_axis, b_axis):
  return jax.lax.dot_general(
    a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
  )


def _pick(mask, x):
  return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _make_head_masks(slot: int) -> list[jax.Array]:
  """Returns for each head which of 128 lanes are its, bool `[1, 128]`."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  return [lane // slot == i for i in range(LANES // slot)]


def _for_chunks(start: int, length: int, body) -> None:
  """Calls `body` with slices of nearly equal size that cover a sequence."""
  size = -(-length // math.ceil(length / _CHUNK))
  size += -size % 16
  full = length // size

  def step(i, _):
    first = start + i * size
    body(pl.ds(pl.multiple_of(first, math.gcd(start, size)), size))

  if full:
    jax.lax.fori_loop(0, full, step, None)
  if length % size:
    body(pl.ds(start + full * size, length % size))
