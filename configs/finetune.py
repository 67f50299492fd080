"""Fine-tuning: encoder and probe trained together, with labels.

  python main.py --config=configs/finetune.py:ssv2,backbone=PATH \
      --workdir=runs/tuned --config.data.train=train.csv \
      --config.data.test=test.csv

Options: data=folder|k400|k400_h16|ssv2|ssv2_h16, backbone=PATH.
The backbone is a workdir, a Hugging Face folder or an official file. `folder`,
the default, is for data of your own, clips cut as the backbone's. Sources:
`k400`, `k400_h16`, `ssv2` and `ssv2_h16` are table 11 of V-JEPA 1 (arXiv
2404.08471); `folder` is what VideoMAE (arXiv 2203.12602) fine-tunes ViT-B with
on SSv2. Rates are for batches of 256 clips and scale with the batch, as
VideoMAE's code does it. Departures:
  - the head is V-JEPA's attentive probe, where the table has a linear one, with
    dropout of .5 on SSv2;
  - crops and flips alone: no RandAugment, colour jitter, erasing, mixup, cutmix
    and repeated samples;
  - one crop at test, the centre, of each segment, where the table has three;
  - `ssv2_h16` ends at the rate of `ssv2`, because the table's 1.5e-3 is above
    the rate that it starts from.
"""

from ml_collections import config_dict

from configs import base

# Batch size, epochs, drop path; rate at the start, after the warm-up and at the
# end, for a batch of 256; probability of a flip, test segments.
_PUBLISHED = {
  'folder': (64, 50.0, 0.1, (1e-6, 5e-4, 1e-6), 0.0, 2),
  'k400': (256, 35.0, 0.1, (1e-6, 2e-3, 1e-6), 0.5, 5),
  'k400_h16': (1024, 25.0, 0.2, (1e-8, 5e-4, 1e-5), 0.5, 5),
  'ssv2': (256, 15.0, 0.2, (1e-6, 5e-4, 1.5e-4), 0.0, 2),
  'ssv2_h16': (256, 15.0, 0.2, (1e-6, 5e-4, 1.5e-4), 0.0, 2),
}


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    arg: `DATA,backbone=PATH`.
  """
  options = base.parse_arg(arg, data='folder', backbone='')
  batch_size, epochs, drop_path, rates, flip, segments = base.choose(
    options, 'data', _PUBLISHED
  )
  published = options['data'] != 'folder'
  general = base.get_config()
  config = config_dict.ConfigDict()
  config.task = 'finetune'
  for name in (
    'seed',
    'smoke',
    # Of an encoder that starts from nothing, where there is no backbone.
    'encoder',
    'compute_dtype',
    'remat',
    'attention',
    'clip',
    'total_steps',
    'total_epochs',
    'optimizer',
    'clip_norm',
    'max_skipped',
    'fsdp',
    'checkpoint',
    'log_every_steps',
  ):
    config[name] = general.get_ref(name)
  config.backbone = options['backbone']
  # target_encoder or encoder, of the backbone.
  config.which = 'target_encoder'
  # The published one of V-JEPA 1: no self-attention before the query.
  config.probe = dict(depth=0)
  # None: one more than the largest label, for which all are read at the start.
  config.num_classes = config_dict.placeholder(int)
  if published:
    config.num_classes = 400 if options['data'].startswith('k400') else 174

  config.data = dict(
    train='',  # any source with labels
    test='',
    batch_size=batch_size,
    num_workers=8,
    num_threads=2,
    read_ahead=256,  # clips
    changed=False,
  )
  # What is None is as the backbone's clips.
  config.clip.update(
    frames=config_dict.placeholder(int),
    resolution=config_dict.placeholder(int),
    crop_scale=(0.08, 1.0),
    crop_aspect_ratio=(0.75, 4 / 3),
    flip=flip,
  )
  if published:
    config.clip.update(frames=16, resolution=224, frame_step=4)

  config.total_epochs = epochs
  config.learning_rate = dict(
    kind='cosine',
    start=rates[0],
    value=rates[1],
    final=rates[2],
    warmup_steps=config_dict.placeholder(int),
    warmup_epochs=5.0,
  )
  config.weight_decay = 0.05
  config.layer_decay = 0.75
  config.drop_path_rate = drop_path
  config.label_smoothing = 0.1

  # On the test videos, also before the first step and after the last; what
  # results.json has is the last, never the best.
  config.evaluation = dict(
    segments=segments,
    batch_size=32,  # videos
    every_steps=config_dict.placeholder(int),
    every_epochs=5.0,
  )
  return config
