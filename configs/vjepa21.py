"""V-JEPA 2.1: dense features of videos and images (arXiv 2603.14482).

  python main.py --config=configs/vjepa21.py:G16 --workdir=runs/G16 \
      --config.data.sources.videos.path='data/shards/*.array_record' \
      --config.image.sources.images.path=data/images
  python main.py --config=configs/vjepa21.py:G16,stage=cooldown \
      --config.init_from=runs/G16 --workdir=runs/G16_cooldown \
      --config.data.sources.videos.path='data/shards/*.array_record' \
      --config.image.sources.images.path=data/images
  python main.py --config=configs/vjepa21.py:l16,stage=distill_1 \
      --config.objective.vjepa21.teacher=runs/G16 --workdir=runs/l16_1 \
      --config.data.sources.videos.path='data/shards/*.array_record' \
      --config.image.sources.images.path=data/images
  python main.py --config=configs/vjepa21.py:l16,stage=distill_2 \
      --config.objective.vjepa21.teacher=runs/G16_cooldown \
      --config.init_from=runs/l16_1 --workdir=runs/l16 \
      --config.data.sources.videos.path='data/shards/*.array_record' \
      --config.image.sources.images.path=data/images

Options: variant=G16|g16|l16|b16, stage=pretrain|cooldown|distill_1|distill_2,
numbers=paper|release, data=videos|mixture.
`numbers` says whose, where paper and released files (configs/train_2_1) differ:
rate, length, batches, weight of visible tokens of images, sizes of the
cooldown. Distillation is in the paper alone, which has a teacher of size G16:
the last level of the one before its cooldown for `distill_1`, of the one after
it for `distill_2`, which goes on from the average of `distill_1`. What it does
not say of rate, length and masks is that of pretrain and of cooldown. Released
files become teachers by `python -m vjepa_jax.tools.convert --format=jax`. The
paper's 128 videos a step are for 128 devices at most; `release` has 3072.
`data=mixture` has the published sources and weights, each with its own path.
Departures, each said once:
- Fixed token counts, random subsets and a block size a clip, as in vjepa1.py.
- Frames are chosen by presentation time, positions turn in float32, and there
  is one mask token, as in vjepa2.py.
- Images are rows of every device's batch, not those of half of the devices.
- The third level of G16 is block 37, counted from 0, as released; 35 in the
  paper.
- The cooldown weighs all visible tokens alike, and at once, as released; the
  paper does not say. `distill_2`, too short for a warm-up, has them at once.
"""

from ml_collections import config_dict

from configs import base

# Size of the encoder, blocks of the predictor (configs/train_2_1).
_VARIANTS = {
  'G16': ('gigantic', 24),
  'g16': ('giant', 24),
  'l16': ('large', 24),
  'b16': ('base', 12),
}

# Frames, resolution of videos and of images, videos and images a step: table of
# hyperparameters of the paper, configs/train_2_1.
_PRETRAIN, _COOLDOWN = (16, 256, 256, 128, 2304), (64, 384, 512, 128, 2304)
_STAGES = {
  'paper': {
    'pretrain': _PRETRAIN,
    'cooldown': _COOLDOWN,
    'distill_1': _PRETRAIN,
    'distill_2': _COOLDOWN,
  },
  'release': {
    'pretrain': (16, 256, 256, 3072, 4608),
    'cooldown': (64, 256, 256, 3072, 9216),
  },
}
# Steps, peak of the rate, scale of the cooldown's schedule, weight of the
# visible tokens of images: as above.
_NUMBERS = {
  'paper': (135_000, 5.25e-4, 1.0, 0.7),
  'release': (300_000, 6e-4, 1.25, 0.5),
}
# (context, target) of the short and the long mask by frames and resolution:
# near the published means at 24 and 48 clips a GPU, of the cooldown at 12 and
# 24, contexts in multiples of 128; and of the mask of images, at 36 to 144.
_VIDEO_MASKS = {
  (16, 256): ((512, 896), (128, 1408)),
  (64, 256): ((1920, 3968), (512, 5760)),
  (64, 384): ((4992, 9216), (1536, 13312)),
}
_IMAGE_MASKS = {256: (40, 128), 512: (192, 512)}

# Weights of the sources of videos: table 3 of the paper, configs/train_2_1.
_MIXTURES = {
  'paper': dict(ssv2=0.17, kinetics=0.01, howto100m=0.1, yt_temporal_1b=0.72),
  'release': dict(k710=0.335, ssv2=0.1, howto100m=0.565),
}


def get_config(arg: str | None = None):
  """Returns the recipe of a variant and stage."""
  options = base.parse_arg(
    arg, variant='G16', stage='pretrain', numbers='paper', data='videos'
  )
  size, depth = base.choose(options, 'variant', _VARIANTS)
  numbers = options['numbers']
  stages = base.choose(options, 'numbers', _STAGES)
  frames, resolution, image_resolution, batch_size, image_batch_size = (
    base.choose(options, 'stage', stages)
  )
  steps, rate, schedule_scale, image_weight = _NUMBERS[numbers]
  is_distilled = options['stage'].startswith('distill')
  config = base.get_config()
  config.seed = 239
  config.encoder.update(
    size=size,
    positions='rope_rescaled',
    scale_init_by_depth=True,
    levels=True,
    modalities=True,
  )
  config.predictor.update(num_heads=12, depth=12 if is_distilled else depth)

  mixtures = {'videos': {'videos': 1.0}, 'mixture': _MIXTURES[numbers]}
  config.data.sources = {
    name: dict(path='', weight=weight)
    for name, weight in base.choose(options, 'data', mixtures).items()
  }
  config.data.batch_size = batch_size
  config.clip.update(frames=frames, fps=4.0, resolution=resolution)
  config.image.update(batch_size=image_batch_size, resolution=image_resolution)
  base.set_published_masks(config, *_VIDEO_MASKS[frames, resolution])
  context, target = _IMAGE_MASKS[image_resolution]
  config.masks.image = config.masks.short.to_dict() | dict(
    num_blocks=10, context_tokens=context, target_tokens=target
  )

  config.objective.kind = 'vjepa21'
  dense = config.objective.vjepa21
  dense.image_context_weight = image_weight
  if is_distilled:
    dense.teacher = config_dict.placeholder(str)  # to be given
  # Weight decay .04 and momentum .99925 stay constant (the neutral values).
  if options['stage'] in ('pretrain', 'distill_1'):
    config.total_steps = steps
    config.learning_rate.update(
      kind='constant', start=1e-4, value=rate, warmup_steps=12_000
    )
  else:
    # As released the curve is 1.25 times as long as the run, which therefore
    # ends at 1.2e-4, not at 1e-6.
    config.total_steps = 12_000
    config.schedule_scale = schedule_scale
    config.learning_rate.update(kind='linear', value=6e-4, final=1e-6)
    dense.update(context_warmup_steps=(0, 0), context_distance=is_distilled)
    config.init_average = is_distilled
  return config
