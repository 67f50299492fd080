"""The predictor: a narrow ViT from context features to target features."""

from flax import linen as nn
import jax.numpy as jnp

from vjepa_jax.models import transformer
from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.linear import Dense, make_initializer
from vjepa_jax.models.options import Options
from vjepa_jax.models.positions import Grid, encode_positions
from vjepa_jax.models.tubelets import Tokens


class Predictor(Options):
  """Predicts features of hidden tokens from those of the visible ones.

  Context features, brought to `width`, and mask tokens, one for each hidden
  place, go through one transformer with full attention (V-JEPA 1, section 3).
  """

  out_width: int  # features that are predicted of a token
  width: int = 384
  depth: int = 12
  num_heads: int = 12  # of V-JEPA 2; V-JEPA 1 has as many as its encoder
  # One a mask spec in V-JEPA 1; in V-JEPA 2 all specs share the first.
  num_mask_tokens: int = 1
  # The features of visible tokens, through a projection of their own
  # (V-JEPA 2.1).
  predict_context: bool = False
  positions: str = 'sincos'  # see `Encoder`
  # Levels of the encoder that the context features hold, end to end; more than
  # one are brought together by a perceptron (V-JEPA 2.1).
  levels: int = 1
  modalities: bool = False  # add a vector of the modality (V-JEPA 2.1)

  @nn.compact
  def __call__(
    self,
    context: Tokens,
    context_ids: Tokens,
    target_ids: Tokens,
    grid: Grid,
    mask_index: int = 0,
    coordinates: jnp.ndarray | None = None,
    is_image: bool = False,
  ) -> Tokens:
    """Predicts the features of `target_ids`.

    Given tuples, one entry a mask spec, each entry is predicted by itself, all
    of them in one pass.

    Args:
      context: Features of the visible tokens, `[B, Kc, D]`.
      context_ids: int32 `[B, Kc]`, raster order over (t, h, w).
      target_ids: int32 `[B, Kt]`, raster order over (t, h, w).
      grid: Tubelet grid that the ids refer to.
      mask_index: Which mask token to use, of tuples for the first entry; wraps
        around, so that specs share tokens where there are fewer than specs.
      coordinates: float32 `[N, 3]`, (t, h, w) of the token of each id for RoPE;
        None for those of the grid.
      is_image: Whether the clips are images, where there are `modalities`.

    Returns:
      `[B, Kt, out_width]` in the compute dtype. With `predict_context` a
      pair: that, and `[B, Kc, out_width]` of the visible tokens.
    """
    several = isinstance(context, tuple)
    sequences = context, context_ids, target_ids
    if not several:
      sequences = tuple((x,) for x in sequences)
    heads = self._predict(*sequences, grid, mask_index, coordinates, is_image)
    if not several:
      heads = tuple(predictions[0] for predictions in heads)
    return heads if self.predict_context else heads[0]

  def _predict(
    self, context, context_ids, target_ids, grid, index, coordinates, is_image
  ):
    def project(x, features, name):
      init = make_initializer(self.init_std, x.shape[-1])
      return Dense(
        features=features, kernel_init=init, dtype=self.dtype, name=name
      )(x)

    x, sizes = tub.pack(context)
    if self.levels > 1:
      x = transformer.gelu(project(x, x.shape[-1] // self.levels, 'fuse'))
    x = project(x, self.width, 'embed')
    # Zero at first, as in every published config.
    mask_tokens = self.param(
      'mask_tokens', nn.initializers.zeros, (self.num_mask_tokens, self.width)
    )
    sequences, sequence_ids, parts = [], [], []
    for i, visible in enumerate(tub.unpack(x, sizes)):
      token = mask_tokens[(index + i) % self.num_mask_tokens]
      shape = (*target_ids[i].shape, self.width)
      sequences += [visible, jnp.broadcast_to(token.astype(x.dtype), shape)]
      sequence_ids += [context_ids[i], target_ids[i]]
      parts += [sizes[i], shape[1]]
    x, _ = tub.pack(sequences)
    if self.modalities:
      x = x + tub.get_modality(self, is_image, self.width, x.dtype)
    x, rope = encode_positions(
      x,
      jnp.concatenate(sequence_ids, axis=1),
      grid,
      self.positions,
      self.width // self.num_heads,
      coordinates,
    )
    x = transformer.Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_dim=4 * self.width,
      **self.get_options(),
      name='transformer',
    )(x, rope, tuple(map(sum, zip(parts[::2], parts[1::2], strict=True))))
    norm = transformer.LayerNorm(dtype=self.dtype, name='norm')

    def predict(first, name):
      tokens, sizes = tub.pack(tub.unpack(x, tuple(parts))[first::2])
      return tub.unpack(project(norm(tokens), self.out_width, name), sizes)

    hidden = predict(1, 'proj')
    if not self.predict_context:
      return (hidden,)
    return hidden, predict(0, 'proj_context')
