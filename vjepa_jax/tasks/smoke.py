"""Shrinks any recipe to toy size, so that each one can be run anywhere."""

from etils import epath
from ml_collections import config_dict

from vjepa_jax.masks.fixed_size import build_mask_sampler
from vjepa_jax.sets.toy import write_toy_videos

_STEPS = 4


def shrink(
  config: config_dict.ConfigDict, workdir: epath.Path
) -> config_dict.ConfigDict:
  """Shrinks a recipe to a few steps of a toy model on rendered videos.

  What makes the recipe stays: positions, initialisation, mask patterns,
  objective, kinds of schedules, ways of sampling. Sizes go: the encoder is the
  smallest, clips are small, durations short, and the videos are rendered into
  the workdir.

  Args:
    config: Any pretraining recipe.
    workdir: Directory of the run; the videos go to its `smoke_videos`.

  Returns:
    Another config, with `smoke` off.
  """
  config = config_dict.ConfigDict(config.to_dict())
  config.smoke = False
  manifest = str(write_toy_videos(workdir / 'smoke_videos', 12))
  config.encoder.update(size='nano', tubelet=(2, 8, 8))
  config.predictor.update(width=48, depth=2, num_heads=2)
  config.compute_dtype = 'float32'
  config.data.sources = dict(toy=dict(path=manifest, weight=1.0))
  config.data.update(batch_size=8, num_workers=0)
  config.clip.update(frames=8, resolution=48)
  if config.clip.frame_step:
    config.clip.frame_step = 2

  grid = (4, 6, 6)
  for name in config.mask_names:
    options = config.masks[name].to_dict()
    context, target = _fit_counts(grid, options)
    config.masks[name].update(context_tokens=context, target_tokens=target)

  config.total_steps = _STEPS
  config.total_epochs = None
  config.learning_rate.warmup_epochs = None
  if config.learning_rate.warmup_steps:
    config.learning_rate.warmup_steps = 2
  config.clip_start_step = 1
  config.checkpoint.every_steps = 2
  config.log_every_steps = 1
  config.diagnose_every_steps = 2
  config.probe.update(
    train=manifest, test=manifest, every_steps=_STEPS, batch_size=8
  )
  config.init_from = config.teacher = ''
  if config.objective.targets == 'frozen':
    config.objective.targets = 'ema'  # there is no teacher of toy size
  return config


def _fit_counts(grid, options):
  """Finds token counts for a toy grid that most draws can meet."""
  kind = options.pop('kind')
  num_tokens = grid[0] * grid[1] * grid[2]
  share = options.pop('context_tokens'), options.pop('target_tokens')
  if options.get('complement', 'none') != 'none':
    context = max(1, num_tokens * share[0] // sum(share))
    return context, num_tokens - context
  for context, target in ((24, 48), (16, 48), (8, 72), (4, 60), (4, 24)):
    counts = dict(context_tokens=context, target_tokens=target)
    try:
      build_mask_sampler(grid, kind, options | counts)
    except ValueError:
      continue
    return context, target
  raise ValueError(f'no token counts fit mask kind {kind!r} on a toy grid')


def shrink_finetuning(
  config: config_dict.ConfigDict, workdir: epath.Path
) -> config_dict.ConfigDict:
  """Shrinks a recipe of fine-tuning as `shrink` does it, without a backbone."""
  config = config_dict.ConfigDict(config.to_dict())
  config.smoke = False
  manifest = str(write_toy_videos(workdir / 'smoke_videos', 12))
  config.backbone, config.num_classes = '', None
  config.encoder.update(size='nano', tubelet=(2, 8, 8))
  config.compute_dtype = 'float32'
  config.data.update(train=manifest, test=manifest, batch_size=8, num_workers=0)
  config.clip.update(frames=8, resolution=48, frame_step=2, fps=None)
  config.total_steps, config.total_epochs = _STEPS, None
  config.learning_rate.update(warmup_steps=2, warmup_epochs=None)
  config.checkpoint.every_steps = 2
  config.log_every_steps = 1
  config.evaluation.update(every_steps=_STEPS, every_epochs=None, batch_size=8)
  return config
