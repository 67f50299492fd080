"""How targets are normalised before they are predicted."""

import jax
import jax.numpy as jnp


def normalize_features(features: jax.Array) -> jax.Array:
  """LayerNorm without parameters, epsilon 1e-5, in float32: `[..., D]`."""
  x = features.astype(jnp.float32)
  mean = x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def normalize_over_clips(features: jax.Array) -> jax.Array:
  """Standardises each feature over clips at each position, in float32.

  Args:
    features: `[B, N, D]` of all tokens, so that row n is one position.

  Returns:
    float32 `[B, N, D]` with mean 0 over B. A feature that does not vary is not
    blown up: .05 is added to its deviation.
  """
  x = features.astype(jnp.float32)
  x = x - x.mean(axis=0)
  return x / (jnp.sqrt(jnp.square(x).mean(axis=0)) + 0.05)


def normalize_tubelets(tubelets: jax.Array) -> jax.Array:
  """Standardises each colour of each flattened tubelet (VideoMAE).

  Args:
    tubelets: Pixels `[..., t * p * p * 3]` as of `patchify`.

  Returns:
    float32 of the same shape. A hundredth of full scale is added to the
    deviation, or flat tubelets would be nothing but noise.
  """
  shape = tubelets.shape
  x = tubelets.astype(jnp.float32).reshape(*shape[:-1], -1, 3) / 255.0
  x = x - x.mean(axis=-2, keepdims=True)
  std = jnp.sqrt(jnp.square(x).mean(axis=-2, keepdims=True))
  return (x / (std + 0.01)).reshape(shape)
