"""What every pretraining recipe has, with neutral values.

Durations are given in steps (`*_steps`) or in passes over the data
(`*_epochs`); a recipe sets one of the two.
"""

from ml_collections import config_dict


def parse_arg(arg: str | None, **defaults: str) -> dict[str, str]:
  """Parses the part of --config after the colon: `l16` or `variant=l16,a=b`.

  Args:
    arg: What follows the colon. A word without '=' sets the first option.
    **defaults: The options that exist, with their defaults.

  Raises:
    ValueError: An option does not exist.
  """
  options = dict(defaults)
  for part in (arg or '').split(','):
    if not part:
      continue
    name, equals, value = part.partition('=')
    if not equals:
      name, value = next(iter(defaults)), part
    if name not in defaults:
      raise ValueError(
        f'config option {name!r} in {arg!r} is not one of {list(defaults)}'
      )
    options[name] = value
  return options


def choose(options: dict[str, str], name: str, table: dict):
  """Looks up an option in a table, with an error that lists what exists."""
  if options[name] not in table:
    raise ValueError(
      f'config {name} {options[name]!r} is not one of {list(table)}'
    )
  return table[options[name]]


def set_published_masks(
  config: config_dict.ConfigDict,
  short: tuple[int, int],
  long: tuple[int, int],
) -> None:
  """Sets the short- and long-range masks of V-JEPA 1 and 2.

  Args:
    config: The recipe.
    short: Context and target tokens of the mask of 8 blocks of .15.
    long: Of the mask of 2 blocks of .7.
  """
  config.mask_names = ('short', 'long')
  for name, num_blocks, scale, (context, target) in (
    ('short', 8, 0.15, short),
    ('long', 2, 0.7, long),
  ):
    config.masks[name] = dict(
      kind='multiblock',
      num_blocks=num_blocks,
      spatial_scale=(scale, scale),
      aspect_ratio=(0.75, 1.5),
      temporal_scale=(1.0, 1.0),
      context_tokens=context,
      target_tokens=target,
      subset='random',
    )


def get_config() -> config_dict.ConfigDict:
  """Returns a pretraining config without data."""
  config = config_dict.ConfigDict()
  config.task = 'pretrain'
  config.seed = 0
  # Shrink the recipe to toy size and a few steps on rendered videos.
  config.smoke = False

  # Models. attention: 'auto' asks the platform; see models/attention.py.
  config.encoder = dict(
    size='large',
    tubelet=(2, 16, 16),
    positions='sincos',
    pixel_norm='imagenet',
    init_std=0.02,  # 0: 1 / sqrt(inputs) of each kernel
    scale_init_by_depth=False,
    # Of V-JEPA 2.1: supervise the outputs of four blocks, see `zoo.LEVELS`; and
    # embed images, clips of one frame, by tubelets of one frame.
    levels=False,
    modalities=False,
  )
  config.predictor = dict(
    width=384,
    depth=12,
    num_heads=config_dict.placeholder(int),  # None: as the encoder
    num_mask_tokens=1,
  )
  config.compute_dtype = 'bfloat16'
  config.remat = 'full'
  config.attention = 'auto'

  # Data. Each source: a folder, glob, manifest, shards, tars, tfds:name/split,
  # its weight in the mixture, and where it differs how its clips are cut.
  config.data = dict(
    sources=dict(
      videos=dict(
        path='',
        weight=1.0,
        fps=config_dict.placeholder(float),  # instead of that of clip; or
        frame_step=config_dict.placeholder(int),
        frames=config_dict.placeholder(int),  # distinct ones, then repeated
      ),
    ),
    batch_size=3072,  # clips a step, over all devices
    num_workers=8,  # decoding processes a task: a host, or a GPU under SLURM
    num_threads=2,  # videos decoded at a time, each
    read_ahead=256,  # clips a host may hold beside the batch that is joined
    changed=False,  # a run may go on with other data than it had
  )
  config.clip = dict(
    frames=16,
    resolution=224,
    frame_step=config_dict.placeholder(int),
    fps=config_dict.placeholder(float),
    num_clips=1,
    crop_scale=(0.3, 1.0),
    crop_aspect_ratio=(0.75, 1.35),
    flip=0.5,
    max_seconds=60.0,  # of computing for a clip; a video beyond is replaced
    max_gib=16.0,  # size of a file; likewise
  )
  # Images beside the clips of each batch, for objectives that take them; none
  # where batch_size is 0. Sources are those of data; a video gives a frame.
  config.image = dict(
    sources=dict(images=dict(path='', weight=1.0)),
    batch_size=0,  # images a step, over all devices
    resolution=224,
    crop_scale=(0.3, 1.0),
    crop_aspect_ratio=(0.75, 1.35),
    flip=0.5,
    mask_names=('image',),  # of masks
  )
  # masks.NAME = dict(kind=..., context_tokens=..., target_tokens=..., ...); the
  # names say which are used, and which mask token belongs to which.
  config.masks = config_dict.ConfigDict()
  config.mask_names = ()

  config.objective = dict(
    kind='vjepa',  # one of the below, which all take the options of vjepa too
    vjepa=dict(
      loss_exp=1.0,  # power of the error
      target_norm='layer',  # or 'position': over the clips of the batch
      target_view='clip',  # or 'targets': the target encoder sees no context
      variance_weight=0.0,  # hinge on the deviation of predictions
    ),
    vjepa21=dict(
      # Of the loss on visible tokens (V-JEPA 2.1, arXiv 2603.14482).
      context_weight=0.5,
      context_warmup_steps=(15_000, 30_000),  # it rises from 0 between them
      context_distance=True,  # less for tokens far from what is hidden
      image_context_weight=0.5,  # context_weight of images
      image_share=0.5,  # of the loss of images in that of the batch
      # Distillation: the workdir of a frozen teacher of any size, whose last
      # block's features are predicted; '' for the average of the encoder.
      teacher='',
    ),
    # SALT (arXiv 2509.24317): without a teacher pixels are predicted, its first
    # stage; with the workdir of one its features, the second. The teacher may
    # be of any size, on the same tubelets.
    salt=dict(teacher=''),
    # On the features of visible tokens; goes with the options of vjepa alone.
    regularized=dict(
      feature_variance_weight=0.0,  # VICReg (arXiv 2105.04906)
      covariance_weight=0.0,  # VICReg
      sigreg_weight=0.0,  # LeJEPA (arXiv 2511.08544)
    ),
  )

  # Schedules; their curves are `schedule_scale` times as long as the run
  # ("ipe_scale"), so that published runs stop before the curves end.
  config.total_steps = config_dict.placeholder(int)
  config.total_epochs = config_dict.placeholder(float)
  config.schedule_scale = 1.0
  config.learning_rate = dict(
    kind='constant',
    start=config_dict.placeholder(float),
    value=1e-3,
    final=config_dict.placeholder(float),
    warmup_steps=config_dict.placeholder(int),
    warmup_epochs=config_dict.placeholder(float),
  )
  config.weight_decay = dict(
    kind='constant', value=0.04, final=config_dict.placeholder(float)
  )
  config.ema = dict(
    kind='constant', value=0.99925, final=config_dict.placeholder(float)
  )
  config.optimizer = dict(
    kind='adamw',  # or 'muon': blocks' matrices by Muon, the rest by AdamW
    b1=0.9,
    b2=0.999,
    eps=1e-8,
  )
  config.clip_norm = config_dict.placeholder(float)
  config.clip_start_step = 0
  config.max_skipped = 20

  # Weights to go on from: a workdir, of which the moments are taken too, for a
  # later stage; a Hugging Face folder or an official file (docs/adapting.md).
  config.init_from = ''
  # The encoder goes on from its average there, and the moments start anew.
  config.init_average = False

  # Devices in a group that shares one copy of the state.
  config.fsdp = 1
  # Parts of a batch that go through the devices one after the other: the same
  # numbers with less memory, for fewer chips than the recipe was made for.
  config.microbatches = 1

  config.checkpoint = dict(
    every_steps=1000, keep=2, keep_every_steps=config_dict.placeholder(int)
  )
  config.log_every_steps = 50
  config.diagnose_every_steps = 500

  # kNN and linear accuracy of the mean-pooled target features, on two labelled
  # sources; off without paths. With attentive_labels also that of an attentive
  # probe on so many labelled clips; it keeps the tokens of all clips in memory.
  config.probe = dict(
    train='',
    test='',
    every_steps=5000,
    max_clips=2000,
    batch_size=64,
    attentive_labels=0,
    attentive_steps=500,
  )
  return config
