"""V-JEPA 1: VideoMix2M pretraining (Bardes et al. 2024, tables 7 and 8).

  python main.py --config=configs/vjepa1.py:l16 --workdir=runs/vjepa1_l16 \
      --config.data.sources.videos.path='data/shards/*.array_record'

Options: variant=l16|h16|h16_384.
Departures, each for one compiled program with fixed token counts (see
vjepa_jax/masks/fixed_size.py):
- Context and target counts are constants near the published means over
  batches of 24 clips a GPU, not the minimum of each batch.
- A random subset of the tokens is kept, not the first ones in raster order;
  `--config.masks.short.subset=first --config.masks.long.subset=first` keeps
  those.
- Each clip draws its own block size.
"""

from configs import base

# size, resolution, batch, (context, target) of the short and the long mask.
_VARIANTS = {
  'l16': ('large', 224, 3072, (360, 752), (104, 1104)),
  'h16': ('huge', 224, 3072, (360, 752), (104, 1104)),
  # 10 clips a GPU, hence other means: 1300, 423 of 4608; 2300, 3326.
  'h16_384': ('huge', 384, 2400, (1300, 2300), (424, 3328)),
}


def get_config(arg: str | None = None):
  """Returns the recipe of a variant."""
  options = base.parse_arg(arg, variant='l16')
  size, resolution, batch_size, short, long = base.choose(
    options, 'variant', _VARIANTS
  )
  config = base.get_config()
  config.seed = 234
  config.encoder.size = size
  config.encoder.positions = 'sincos'
  config.encoder.scale_init_by_depth = False  # overwritten when published
  config.predictor.num_mask_tokens = 2  # one a mask

  config.data.batch_size = batch_size
  config.clip.frames = 16
  config.clip.frame_step = 4
  config.clip.resolution = resolution

  base.set_published_masks(config, short, long)

  # 300 epochs of 300 steps; warm-up of 40.
  config.total_steps = 90_000
  config.schedule_scale = 1.25
  config.learning_rate.update(
    kind='cosine',
    start=2e-4,
    value=6.25e-4,
    final=1e-6,
    warmup_steps=12_000,
  )
  config.weight_decay.update(kind='cosine', value=0.04, final=0.4)
  config.ema.update(kind='linear', value=0.998, final=1.0)
  config.clip_norm = 10.0
  config.clip_start_step = 12_300  # from the first epoch after the warm-up's
  return config
