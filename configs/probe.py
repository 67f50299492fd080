"""Frozen evaluation: probes on the features of an encoder that stays as it is.

  python main.py --config=configs/probe.py:ssv2,backbone=PATH \
      --workdir=runs/ssv2 --config.data.train=train.csv \
      --config.data.test=test.csv
  python main.py --config=configs/probe.py:folder,backbone=runs/quickstart \
      --workdir=runs/quickstart/probe \
      --config.data.train=data/motion/train.csv \
      --config.data.test=data/motion/test.csv

Options: data=folder|k400|ssv2|coin|diving48|jester|in1k|in1k_image,
backbone=PATH, probe=v2|v1|linear.
The backbone is a workdir, a Hugging Face folder or an official file; sources
are whatever training takes, with labels, or what vjepa_jax.tools.extract made
of them: then probes train in seconds. `folder`, the default, is for data of
your own. `probe=v2` (the default) is the probe and grid of V-JEPA 2 (arXiv
2506.09985, section 5), `probe=v1` those of V-JEPA 1 (arXiv 2404.08471, section
4), `probe=linear` a linear one. --config.random_init=True takes the same
encoder before any training: print it beside every result.
Images are repeated to clips, as V-JEPA 2 was evaluated (`in1k`); V-JEPA 2.1 has
a tokenizer that takes an image as it is: `in1k_image`, --config.clip.frames=1.

Selection: the probe of the grid that is best on validation videos is the one
that is tested, once, on other videos. The papers report the best of the grid
on the validation set itself, which is a little more. Without
config.data.validation a tenth of the training videos is kept for it.
Departures:
  - random crops alone: no RandAugment, no erasing;
  - biases and norms have no weight decay, in both (V-JEPA 2 decays all);
  - images have the grids of videos: for them V-JEPA 2 searches rates of 5e-4 to
    2e-3, some after a warm-up, and decays of .0005 to .008, V-JEPA 1 has .001.
"""

from ml_collections import config_dict

from configs import base

# Classes, frames, resolution, frame step, segments, views, batch size, epochs.
_DATA = {
  'folder': (None, None, None, None, 1, 1, 64, 20),
  'k400': (400, 16, 256, 4, 8, 3, 256, 20),
  'ssv2': (174, 16, 256, 4, 2, 3, 256, 20),
  'coin': (180, 16, 256, 4, 8, 3, 128, 20),
  'diving48': (48, 32, 256, 2, 4, 3, 128, 100),
  'jester': (27, 32, 256, 2, 4, 3, 128, 100),
  'in1k': (1000, 16, 256, 1, 1, 1, 1024, 20),  # an image is repeated
  'in1k_image': (1000, 1, 256, 1, 1, 1, 1024, 20),  # or not: V-JEPA 2.1
}
# Self-attention blocks, projection after the query, learning rates, weight
# decays, clipping.
_V2 = (
  3,
  False,
  (5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
  (0.01, 0.1, 0.4, 0.8),
  None,
)
_PROBES = {
  'v1': (0, True, (1e-3,), (0.01,), 1.0),
  'v2': _V2,
  'linear': (0, False, (1e-1, 3e-2, 1e-2, 3e-3), (1e-4, 0.01), None),
}
# Where V-JEPA 2 departs from its own grid, and from the last layer: tokens of
# four layers, by the depth of the encoder (ViT-L, ViT-g).
_GRIDS = {
  'diving48': ((1e-3, 3e-4, 1e-4), (0.8,)),
  'jester': ((1e-3, 3e-4, 1e-4), (0.8,)),
}
_LAYERS = {'24': (17, 19, 21, 23), '40': (24, 29, 34, 39)}


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    arg: `DATA,backbone=PATH,probe=KIND`.
  """
  options = base.parse_arg(arg, data='folder', backbone='', probe='v2')
  classes, frames, resolution, step, segments, views, batch_size, epochs = (
    base.choose(options, 'data', _DATA)
  )
  depth, projection, rates, decays, clip_norm = base.choose(
    options, 'probe', _PROBES
  )
  if options['probe'] == 'v1' and resolution:
    resolution = 224  # that of V-JEPA 1's backbones
  if options['probe'] == 'v2':
    rates, decays = _GRIDS.get(options['data'], (rates, decays))
  general = base.get_config()
  config = config_dict.ConfigDict()
  config.task = 'probe'
  for name in (
    'seed',
    'smoke',
    # Of an encoder without a backbone, to try a recipe out.
    'encoder',
    'compute_dtype',
    'attention',
    'clip',
    'optimizer',
    'fsdp',
    'max_skipped',
    'checkpoint',
    'log_every_steps',
  ):
    config[name] = general.get_ref(name)
  config.backbone = options['backbone']
  # target_encoder or encoder, of the backbone.
  config.which = 'target_encoder'
  config.random_init = False
  # None: one more than the largest label, for which all are read at the start.
  config.num_classes = config_dict.placeholder(int)
  if classes:
    config.num_classes = classes

  config.data = dict(
    train='',
    validation='',  # empty: validation_share of the training videos
    test='',
    validation_share=0.1,
    batch_size=batch_size,  # videos
    num_workers=8,
    num_threads=2,
    read_ahead=512,  # clips
    changed=False,
  )
  # What is None is as the backbone's clips.
  config.clip.update(
    frames=config_dict.placeholder(int),
    resolution=config_dict.placeholder(int),
    crop_scale=config_dict.placeholder(tuple),
    crop_aspect_ratio=config_dict.placeholder(tuple),
    flip=0.0,
  )
  if frames:
    config.clip.update(
      frames=frames,
      resolution=resolution,
      frame_step=step,
      fps=None,
      crop_scale=(0.08, 1.0),
      crop_aspect_ratio=(0.75, 4 / 3),
    )

  # Clips of a video that a probe sees together, in training and evaluation;
  # and crops of each in evaluation, over which it averages.
  config.segments = segments
  config.views = views
  # Blocks of the encoder that a probe sees together, counted from 0. None: as
  # layers_of_depth says for an encoder of so many, of V-JEPA 2.1 all its
  # levels, or else the last.
  config.layers = config_dict.placeholder(tuple)
  config.layers_of_depth = _LAYERS if options['data'] in _GRIDS else {}
  config.probe = dict(
    kind='linear' if options['probe'] == 'linear' else 'attentive',
    depth=depth,
    output_projection=projection,
    num_heads=config_dict.placeholder(int),  # None: as the encoder
    learning_rates=rates,
    weight_decays=decays,
    clip_norm=config_dict.placeholder(float),
    # Probes computed side by side, where the whole grid does not fit in memory.
    group_size=config_dict.placeholder(int),
  )
  if options['data'] != 'folder':
    config.probe.group_size = 1
  if clip_norm:
    config.probe.clip_norm = clip_norm
  if options['probe'] == 'v2' and options['data'] != 'folder':
    config.probe.num_heads = 16
  config.total_epochs = float(epochs)
  config.total_steps = config_dict.placeholder(int)
  config.validate_every_epochs = 5.0
  config.evaluation = dict(batch_size=32)  # videos
  # Neighbours of the kNN probe on means over tokens; 0 leaves it out.
  config.knn = 10
  return config
