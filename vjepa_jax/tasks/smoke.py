"""Shrinks recipes to toy size, so that each one can be run anywhere."""

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vjepa_jax.data import storage
from vjepa_jax.errors import UserError
from vjepa_jax.masks.fixed_size import build_mask_sampler
from vjepa_jax.sets.discs import write_discs_set
from vjepa_jax.sets.toy import write_toy_videos
from vjepa_jax.tasks.program import get_grid, list_streams

_STEPS = 4
_VIDEOS = 'smoke_videos'


def shrink(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
  """Shrinks a recipe to a few steps of a toy model on rendered videos.

  What makes the recipe stays: positions, initialisation, mask patterns,
  objective, kinds of schedules, ways of sampling. Sizes go: the encoder is the
  smallest, clips are small, durations short, and the videos are rendered into
  the workdir.

  Args:
    config: A recipe of pretraining, or of fine-tuning or a predictor with
      actions, which start without a backbone; of a quickstart the pretraining
      is left.
    workdir: Directory of the run; the videos go to its `smoke_videos`. Another
      smoke run may be its teacher, or where it goes on from.

  Returns:
    Another config, with `smoke` off.

  Raises:
    UserError: The recipe is another task's.
  """
  is_action = config.task in ('action', 'discs')
  pretrains = config.task in ('pretrain', 'quickstart')
  if not (pretrains or is_action or config.task == 'finetune'):
    raise UserError(
      'config.smoke is for recipes of pretraining, fine-tuning and actions; '
      f'{config.task} needs a backbone, whose size it has: try it with a few '
      'config.total_steps'
    )
  config = ConfigDict(config.to_dict())
  config.smoke = False
  with storage.writing_folder(workdir / _VIDEOS) as folder:
    if is_action:
      write_discs_set(folder, num_train=24)
    else:
      write_toy_videos(folder, 12)
  manifest = str(workdir / _VIDEOS / 'manifest.csv')
  config.encoder.update(size='nano', tubelet=(2, 8, 8))
  config.compute_dtype = 'float32'
  config.data.update(batch_size=8, num_workers=0)
  config.clip.update(frames=8, resolution=48)
  if not config.clip.fps:
    config.clip.frame_step = 2
  config.total_steps, config.total_epochs = _STEPS, None
  rate = config.learning_rate
  if rate.warmup_steps or rate.warmup_epochs:
    rate.update(warmup_steps=2, warmup_epochs=None)
  config.checkpoint.every_steps = 2
  config.log_every_steps = 1
  if is_action:
    _shrink_action(config, str(workdir / _VIDEOS / 'train'))
  elif config.task == 'finetune':
    config.backbone, config.num_classes = '', None
    config.data.update(train=manifest, test=manifest)
    config.evaluation.update(
      every_steps=_STEPS, every_epochs=None, batch_size=8
    )
  else:
    _shrink_pretraining(config, manifest)
  return config


def _shrink_action(config, episodes):
  config.backbone, config.state_kind = '', 'plain'
  config.predictor.update(width=48, depth=2, num_heads=2)
  discs = dict(path=episodes, weight=1.0, camera='')
  config.data.sources = dict(discs=discs)
  config.clip.update(frames=4, resolution=32)
  if config.learning_rate.decay_steps:
    config.learning_rate.decay_steps = 1
  config.held_out.update(path=episodes, every_steps=_STEPS, batches=1)


def _shrink_pretraining(config, manifest):
  config.task = 'pretrain'
  config.predictor.update(width=48, depth=2, num_heads=2)
  config.data.sources = dict(toy=dict(path=manifest, weight=1.0))
  if config.image.batch_size:  # other numbers than those of the videos
    config.image.update(batch_size=16, resolution=64)
    config.image.sources = dict(toy=dict(path=manifest, weight=1.0))
  for name, stream in list_streams(config).items():
    for mask in map(config.masks.get, stream.mask_names):
      context, target = _fit_counts(get_grid(config, name), mask.to_dict())
      mask.update(context_tokens=context, target_tokens=target)
  config.clip_start_step = 1
  config.diagnose_every_steps = 2
  config.probe.update(
    train=manifest,
    test=manifest,
    every_steps=_STEPS,
    batch_size=8,
    attentive_steps=_STEPS,
  )
  config.init_from = _keep_toy(config.init_from)
  config.init_average &= bool(config.init_from)
  dense, salt = config.objective.vjepa21, config.objective.salt
  if dense.context_warmup_steps[1]:
    dense.context_warmup_steps = (1, 3)
  dense.teacher = _keep_toy(dense.teacher or '')
  if salt.teacher:
    salt.teacher = _keep_toy(salt.teacher)
    if not salt.teacher:
      config.objective.kind = 'vjepa'


def _keep_toy(path):
  """Returns the workdir of a smoke run; '' for others, of no toy size."""
  if path and not (epath.Path(path) / _VIDEOS).exists():
    logging.warning('%s is no smoke run: this one goes without it', path)
    return ''
  return path


def _fit_counts(grid, options):
  """Finds token counts for a toy grid that most draws can meet."""
  kind = options.pop('kind')
  num_tokens = grid[0] * grid[1] * grid[2]
  share = options.pop('context_tokens'), options.pop('target_tokens')
  if options.get('complement', 'none') != 'none':
    context = max(1, num_tokens * share[0] // sum(share))
    return context, num_tokens - context
  for context, target in ((24, 48), (16, 48), (8, 72), (4, 60), (4, 24)):
    context, target = (n * num_tokens // 144 for n in (context, target))
    counts = dict(context_tokens=context, target_tokens=target)
    try:
      build_mask_sampler(grid, kind, options | counts)
    except ValueError:
      continue
    return context, target
  raise UserError(f'no token counts fit mask kind {kind!r} on a toy grid')
