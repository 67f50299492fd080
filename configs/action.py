"""V-JEPA 2-AC: a world model with actions, on a frozen encoder.

  python main.py --config=configs/action.py:droid_paper --workdir=runs/ac \
      --config.backbone=vitg.pt --config.data.sources.episodes.path=data/droid
  python main.py --config=configs/action.py:discs --workdir=runs/discs

Options: recipe=droid_paper|droid_release|discs|fetch, backbone=PATH.
The backbone is a workdir, a Hugging Face folder or an official file; without
one the encoder is an untrained one. Episodes: docs/data.md. Sources: section 3
of V-JEPA 2 (arXiv 2506.09985) and its released configs, which agree but for the
clips:
  - `droid_paper`: 16 frames, 4 a second of real time;
  - `droid_release`: 8 frames, every 15th of the film, as the released weights
    were trained: films of DROID say 60 frames a second, of which there were 15.
The loss is that of the corrected code; the released weights came of a faulty
one. `discs` and `fetch` are for one machine. `discs` is a whole chain on the
set of that name: V-JEPA on its films, as configs/small.py, the predictor, and
the ladder of docs/planning.md. Departures:
  - weights initialised at 1 / sqrt(inputs), exact rotations, cosine;
  - `discs`: actions as they were asked for, no states, as walls make the two
    differ (docs/planning.md);
  - `fetch`: features of 128 pixels.
"""

from ml_collections import config_dict

from configs import base, small

_SHARED = (
  'seed',
  'smoke',
  'encoder',
  'compute_dtype',
  'remat',
  'attention',
  'data',
  'total_steps',
  'total_epochs',
  'learning_rate',
  'optimizer',
  'clip_norm',
  'clip_start_step',
  'max_skipped',
  'fsdp',
  'microbatches',
  'checkpoint',
  'log_every_steps',
)


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    arg: `RECIPE,backbone=PATH`.
  """
  options = base.parse_arg(arg, recipe='droid_paper', backbone='')
  shared = base.get_config()
  config = config_dict.ConfigDict({name: shared[name] for name in _SHARED})
  config.task = 'action'
  config.backbone = options['backbone']
  # target_encoder or encoder, of the backbone.
  config.which = 'target_encoder'
  config.predictor = dict(
    width=1024,
    depth=24,
    num_heads=16,
    positions='rope_tiled',  # as released; or 'rope_interleaved'
    init_std=0.02,
    scale_init_by_depth=True,
  )
  config.objective = dict(
    rollout_steps=2,  # imagined frames; 0 for teacher forcing alone
    rollout_prefix='first',  # true frames before them; or a 'random' number
    detach=False,  # no gradient from a prediction to what it was made of
    loss_exp=1.0,
  )
  # 'pose': place, Euler angles, gripper; or 'plain' numbers.
  config.state_kind = 'pose'
  config.extrinsics = False  # a third token a step, of the camera's place

  # Of several cameras which one; '' for the first, of DROID the left one.
  config.data.sources = dict(episodes=dict(path='', weight=1.0, camera=''))
  config.data.batch_size = 256
  config.clip = dict(
    frames=16,
    resolution=config_dict.placeholder(int),  # None: as the backbone
    fps=config_dict.placeholder(float),  # by the time of the rows; or
    frame_step=config_dict.placeholder(int),  # by their number
    max_seconds=60.0,  # of computing for a clip; an episode beyond is replaced
    max_gib=16.0,  # size of a file; likewise
  )
  config.learning_rate.decay_steps = config_dict.placeholder(int)
  config.weight_decay = 0.04
  # The loss on episodes that are not trained on; '' for none.
  config.held_out = dict(path='', every_steps=1000, batches=8)
  recipe = {
    'droid_paper': _set_droid,
    'droid_release': _set_droid,
    'discs': _set_discs,
    'fetch': _set_fetch,
  }
  base.choose(options, 'recipe', recipe)(config)
  if options['recipe'] == 'droid_release':
    config.clip.update(frames=8, fps=None, frame_step=15)
  return config


def _set_droid(config):
  config.seed = 239
  config.encoder.update(
    size='giant', positions='rope_tiled', scale_init_by_depth=True
  )
  config.clip.update(frames=16, resolution=256, fps=4.0)
  # 315 "epochs" of 300 steps; the last one has rate 0.
  config.total_steps = 94_500
  config.learning_rate.update(
    kind='linear',
    start=7.5e-5,
    value=4.25e-4,
    final=0.0,
    warmup_steps=4500,
    decay_steps=4500,
  )
  config.checkpoint.update(every_steps=300, keep_every_steps=7500)


def _set_one_machine(config):
  """Sets what recipes for one machine share."""
  config.compute_dtype = 'float32'  # bfloat16 is emulated on a CPU
  config.remat = 'none'
  config.predictor.update(positions='rope_interleaved', init_std=0.0)
  config.data.update(batch_size=32, num_workers=0, num_threads=2)
  config.learning_rate.update(
    kind='cosine', value=1e-3, final=0.0, warmup_steps=100
  )
  config.clip_norm = 1.0
  config.checkpoint.every_steps = 500
  config.log_every_steps = 20


def _set_discs(config):
  _set_one_machine(config)
  config.task = 'discs'
  # episodes and seeds: tasks of each kind that are planned for.
  config.chain = dict(
    folder='data/discs', num_train=3000, episodes=100, seeds=1
  )
  config.pretraining = _get_pretraining()
  config.state_kind = 'hidden'
  config.predictor.update(width=96, depth=3, num_heads=2)
  config.clip.update(frames=4, fps=4.0)
  config.total_steps = 2000


def _get_pretraining():
  """Returns the recipe of the encoder: configs/small.py but for this."""
  config = small.get_config()
  config.task = 'pretrain'
  del config.motion
  # Tokens of half a frame's side: where things are in them is what is learned,
  # and the energy falls from far off. Whole films, as those that are acted in.
  config.encoder.update(size='nano', tubelet=(2, 16, 16), pixel_norm='imagenet')
  config.predictor.width = 48
  config.data.batch_size = 32
  config.clip.update(frames=16, crop_scale=(1.0, 1.0), flip=0.0)
  config.masks.random.update(context_tokens=16, target_tokens=16)
  # Else features tell of walls, which stay, and not of what moves.
  config.objective.kind = 'regularized'
  config.objective.regularized.sigreg_weight = 0.005
  config.learning_rate.value = 2e-3
  config.total_steps = 900
  config.probe.update(every_steps=0)
  return config


def _set_fetch(config):
  _set_one_machine(config)
  config.encoder.update(
    size='micro',
    tubelet=(2, 16, 16),
    pixel_norm='clip',
    init_std=0.0,
    scale_init_by_depth=True,
  )
  config.predictor.update(width=192, depth=6, num_heads=6)
  config.clip.update(frames=8, resolution=128, fps=5.0)
  config.total_steps = 6000
