"""A recipe that runs in seconds; the argument is the path of its videos."""

from configs import quickstart


def get_config(arg):
  config = quickstart.get_config()
  config.task = 'pretrain'
  config.encoder.update(
    size='nano',
    tubelet=(2, 8, 8),
    positions='rope_interleaved',
    # With larger weights the comparisons would need larger limits.
    init_std=0.02,
  )
  config.predictor.update(width=48, depth=1, num_heads=2)
  config.data.sources = dict(toy=dict(path=arg, weight=1.0))
  config.data.update(batch_size=8, num_threads=1)
  config.clip.update(resolution=32, frames=4)
  config.mask_names = ('short',)
  config.masks.short = dict(
    kind='multiblock',
    num_blocks=8,
    spatial_scale=(0.15, 0.15),
    context_tokens=6,
    target_tokens=10,
  )
  config.log_every_steps = 1
  config.total_steps = 12
  config.learning_rate.warmup_steps = 4
  config.checkpoint.every_steps = 4
  config.diagnose_every_steps = 4
  config.probe.update(train='', test='')
  return config


# Images beside the videos, for the objective that takes them.
IMAGES = {
  'objective.kind': 'vjepa21',
  'objective.vjepa21.context_warmup_steps': (1, 3),
  'encoder.levels': True,
  'encoder.modalities': True,
  'encoder.positions': 'rope_rescaled',
  'objective.vjepa.target_norm': 'layer',
  'image.batch_size': 16,
  'image.resolution': 64,
  'image.mask_names': ('short',),
}


def make_config(videos, changes=None):
  """The recipe for two steps, with changes by their dotted names."""
  config = get_config(str(videos))
  config.total_steps, config.learning_rate.warmup_steps = 2, 1
  with config.unlocked():
    config.update_from_flattened_dict(changes or {})
  return config
