"""A recipe for one machine: what a small V-JEPA learns on two CPU cores.

  python main.py --config=configs/small.py --workdir=runs/small

The motion set, its baselines, pretraining, probes, a table and a picture, in a
quarter of an hour: it is the quickstart. docs/learning.md tells what was tried
on the way here. Departures from V-JEPA 1, beside the sizes:
  - pixels normalised by clip, targets normalised by position: without them
    brightness and a constant are predicted first, and features shrink to that;
  - weights initialised at 1 / sqrt(inputs), which .02 nearly is in the large
    models;
  - random tubelets are hidden, not tubes: what fills a tube for the whole clip
    is never seen;
  - an EMA momentum and a learning rate for hundreds of steps, not 90 000.

Options: variant=random|future.
Variant `future` shows the first half of the clip and hides the second: for
`python -m vjepa_jax.tools.predict`, see docs/prediction.md.
"""

from configs import base

# 4 x 4 x 4 = 64 tokens, half of them visible.
_MASKS = {
  'random': dict(kind='random', ratio=0.5, context_tokens=32, target_tokens=32),
  'future': dict(
    kind='future', context_ratio=(0.5, 0.5), context_tokens=32, target_tokens=32
  ),
}


def get_config(arg: str | None = None):
  """Returns the recipe of a variant, 'random' or 'future' masks."""
  options = base.parse_arg(arg, variant='random')
  mask = base.choose(options, 'variant', _MASKS)
  config = base.get_config()
  config.task = 'quickstart'
  config.encoder.update(
    size='mini',
    tubelet=(4, 8, 8),
    pixel_norm='clip',
    init_std=0.0,  # by the inputs of each kernel
    scale_init_by_depth=True,
  )
  config.predictor.update(width=64, depth=2, num_heads=2)
  config.compute_dtype = 'float32'  # bfloat16 is emulated on a CPU
  config.remat = 'none'

  # Written by vjepa_jax/sets/motion.py from videos of PyPI packages, or from
  # the files in `videos`.
  config.motion = dict(
    folder='data/motion',
    videos='',
    num_train=6000,
    num_test=800,
    max_clips=1600,  # that the probes of the table train on
    few_clips=160,  # and those of its column of few labels
  )
  config.data.update(batch_size=64, num_workers=0, num_threads=2)
  config.clip.update(
    frames=16,
    resolution=32,
    frame_step=1,
    # 32 of 36 pixels, as in evaluation: motion keeps its speed.
    crop_scale=(0.79, 0.8),
    crop_aspect_ratio=(1.0, 1.0),
  )

  config.mask_names = (options['variant'],)
  config.masks[options['variant']] = mask
  config.objective.vjepa.target_norm = 'position'

  config.total_steps = 2000
  config.learning_rate.update(
    kind='cosine', value=1e-3, final=1e-5, warmup_steps=50
  )
  config.weight_decay.update(kind='constant', value=0.04)
  config.ema.update(kind='constant', value=0.99)
  config.clip_norm = 10.0

  config.checkpoint.update(every_steps=100, keep=2)
  config.log_every_steps = 5
  config.diagnose_every_steps = 25
  # The paths are those of the motion set.
  config.probe.update(
    every_steps=400, max_clips=800, batch_size=64, attentive_labels=160
  )
  return config
