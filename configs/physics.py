"""Intuitive physics on a CPU: does a model of a small world notice magic?

  python -m vjepa_jax.tools.physics_set --output=data/physics
  python main.py --config=configs/physics.py --workdir=runs/physics
  python -m vjepa_jax.tools.surprise runs/physics --input=data/physics

A small encoder learns from possible films alone to predict their second half
from their first (vjepa_jax/sets/physics.py); how far off it is on impossible
ones is their surprise, see docs/surprise.md. From configs/small.py
it departs in what is hidden, the future; in data and steps; and in pixels
normalised by fixed statistics, as those of a clip would tell of its future.
"""

from configs import base, small


def get_config(arg: str | None = None):
  """Returns the recipe; it has no options."""
  base.parse_arg(arg, variant='default')
  config = small.get_config()
  config.task = 'pretrain'
  del config.motion
  config.encoder.pixel_norm = 'imagenet'
  config.data.sources = dict(
    physics=dict(path='data/physics/train.csv', weight=1.0)
  )

  # 4 x 4 x 4 = 64 tokens, of which the first two steps in time are seen.
  config.mask_names = ('future',)
  config.masks.future = dict(
    kind='future',
    context_ratio=(0.5, 0.5),
    context_tokens=32,
    target_tokens=32,
  )
  config.total_steps = 600
  config.probe.update(every_steps=0)
  return config
