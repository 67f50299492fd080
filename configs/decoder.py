"""A feature decoder: pixels from the frozen target features of a backbone.

  python main.py --config=configs/decoder.py --workdir=runs/decoder \
      --config.backbone=runs/quickstart

Trained on the videos of the backbone, cut as it cuts them, which its
config.json says; of other backbones (Hugging Face folders, official files) give
`--config.data.sources.videos.path` and `--config.clip...`. It is for
`python -m vjepa_jax.tools.predict --decode=runs/decoder`, see
docs/prediction.md.

Options: variant=small|large.
`small` is for the quickstart's backbone, four minutes on two CPU cores; `large`
for ViT-L and larger on accelerators.
"""

from ml_collections import config_dict

from configs import base

_SHARED = (
  'seed',
  'smoke',
  'compute_dtype',
  'attention',
  'data',
  'total_steps',
  'total_epochs',
  'schedule_scale',
  'learning_rate',
  'weight_decay',
  'ema',
  'optimizer',
  'clip_norm',
  'clip_start_step',
  'max_skipped',
  'fsdp',
  'microbatches',
  'checkpoint',
  'log_every_steps',
)
# decoder, batch size, steps, compute dtype
_VARIANTS = {
  'small': (dict(width=128, depth=3, num_heads=4), 32, 600, 'float32'),
  'large': (dict(width=768, depth=8, num_heads=12), 256, 50_000, 'bfloat16'),
}


def get_config(arg: str | None = None):
  """Returns the recipe of a variant."""
  options = base.parse_arg(arg, variant='small')
  decoder, batch_size, total_steps, dtype = base.choose(
    options, 'variant', _VARIANTS
  )
  shared = base.get_config()
  config = config_dict.ConfigDict({name: shared[name] for name in _SHARED})
  config.task = 'decoder'
  # A workdir of pretraining, a Hugging Face folder or an official file.
  config.backbone = ''
  config.decoder = decoder
  # Power of the error on pixels as the encoder sees them: 2 is what PSNR
  # measures, 1 leaves more contrast.
  config.loss_exp = 2.0
  config.compute_dtype = dtype

  # Empty: the sources of the backbone.
  config.data.update(batch_size=batch_size, num_threads=2)
  config.data.num_workers = 0 if options['variant'] == 'small' else 8
  # None: as the backbone.
  config.clip = dict(
    frames=config_dict.placeholder(int),
    resolution=config_dict.placeholder(int),
    frame_step=config_dict.placeholder(int),
    fps=config_dict.placeholder(float),
  )
  # Clips that the statistics of features are taken from.
  config.statistics_clips = 512

  config.total_steps = total_steps
  config.learning_rate.update(
    kind='cosine', value=2e-3, final=1e-5, warmup_steps=total_steps // 20
  )
  config.ema.update(kind='constant', value=0.99)
  config.clip_norm = 1.0
  config.checkpoint.update(every_steps=total_steps // 4, keep=2)
  config.log_every_steps = 10
  # PSNR of decoded features on held-out videos; '' takes those of the
  # backbone's online probe.
  config.held_out = dict(
    path='', every_steps=total_steps // 4, max_clips=200, batch_size=64
  )
  return config
