"""Ten minutes on two CPU cores: real video in, a table and a picture out.

  python main.py --config=configs/quickstart.py --workdir=runs/quickstart

V-JEPA's published objective and schedules at toy size, on clips cut from real
videos whose label is their motion. Departures from V-JEPA 1: the sizes; a
learning rate and an EMA momentum for hundreds of steps instead of 90 000; RoPE;
instead of the long-range tubes a mask of the future or the past, since a tube
that hides a place for the whole clip never asks what moves where; milder crops;
no flips, which would exchange left and right.
"""

from configs import base


def get_config(arg: str | None = None):
  """Returns the recipe; it has no options."""
  base.parse_arg(arg, variant='default')
  config = base.get_config()
  config.task = 'quickstart'
  config.encoder.update(
    size='micro',
    tubelet=(2, 8, 8),
    positions='rope_interleaved',
    scale_init_by_depth=True,
  )
  config.predictor.update(width=96, depth=3, num_heads=3, num_mask_tokens=2)
  config.compute_dtype = 'float32'  # bfloat16 is emulated on a CPU
  config.remat = 'none'

  # Written by vjepa_jax/data/motion.py from videos of PyPI packages, or from
  # the files in `videos`.
  config.motion = dict(
    folder='data/motion',
    videos='',
    num_train=4000,
    num_test=800,
    max_clips=1600,  # that the probes of the table train on
  )
  config.data.update(batch_size=32, num_workers=0, num_threads=2)
  config.clip.update(
    frames=8,
    resolution=48,
    frame_step=2,
    crop_scale=(0.6, 1.0),
    crop_aspect_ratio=(0.9, 1.1),
    flip=0.0,
  )

  # 4 x 6 x 6 = 144 tokens.
  config.mask_names = ('short', 'time')
  config.masks.short = dict(
    kind='multiblock',
    num_blocks=8,
    spatial_scale=(0.15, 0.15),
    context_tokens=32,
    target_tokens=64,
  )
  config.masks.time = dict(
    kind='either',
    context_ratio=(0.5, 0.5),
    context_tokens=72,
    target_tokens=48,
  )

  config.total_steps = 160
  config.schedule_scale = 1.25
  config.learning_rate.update(
    kind='cosine', start=1e-4, value=6e-4, final=1e-6, warmup_steps=30
  )
  config.weight_decay.update(kind='cosine', value=0.04, final=0.4)
  config.ema.update(kind='linear', value=0.99, final=1.0)
  config.clip_norm = 10.0
  config.clip_start_step = 31

  config.checkpoint.update(every_steps=40, keep=2)
  config.log_every_steps = 1
  config.diagnose_every_steps = 20
  # The paths are those of the motion set.
  config.probe.update(every_steps=80, max_clips=800, batch_size=32)
  return config
