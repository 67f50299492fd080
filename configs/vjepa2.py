"""V-JEPA 2: VM22M pretraining and cooldown (Assran et al. 2025, section 2).

  python main.py --config=configs/vjepa2.py:g16 --workdir=runs/vjepa2_g16 \
      --config.data.sources.videos.path='data/shards/*.array_record'
  python main.py --config=configs/vjepa2.py:variant=g16,stage=cooldown_384 \
      --config.init_from=runs/vjepa2_g16 --workdir=runs/vjepa2_g16_384 \
      --config.data.sources.videos.path='data/shards/*.array_record'

Options: variant=g16|h16|l16, stage=pretrain|cooldown_256|cooldown_384.
Departures, each said once:
- Fixed token counts, random subsets and a block size a clip, as in vjepa1.py.
- Positions turn in float32; published in bfloat16.
- One mask token: of the published ones only the first is ever trained.
- 240 000 + 12 000 steps for every variant (the paper); the published files
  have placeholders of 10 and 4 epochs for some.
- Frames are chosen by presentation time, so that a video of any or a varying
  frame rate gives 4 frames a second.
- One source; give the published mixture by more of them: Something-Something
  v2 .056, Kinetics .188, HowTo100M .318, YT-Temporal-1B .188, ImageNet .250.
"""

from configs import base

# encoder size
_VARIANTS = {'l16': 'large', 'h16': 'huge', 'g16': 'giant'}

# frames, resolution, (context, target) of the short and the long mask: near
# the published means at 24, 12 and 6 clips a GPU, in multiples of 128 (Kc) so
# that a TPU tiles them.
_STAGES = {
  'pretrain': (16, 256, (512, 1024), (128, 1408)),
  'cooldown_256': (64, 256, (2176, 4096), (640, 5760)),
  'cooldown_384': (64, 384, (5504, 9600), (1920, 13440)),
}


def get_config(arg: str | None = None):
  """Returns the recipe of a variant and stage."""
  options = base.parse_arg(arg, variant='g16', stage='pretrain')
  frames, resolution, short, long = base.choose(options, 'stage', _STAGES)
  config = base.get_config()
  config.seed = 239
  config.encoder.size = base.choose(options, 'variant', _VARIANTS)
  config.encoder.positions = 'rope_tiled'
  config.encoder.scale_init_by_depth = True
  config.predictor.num_heads = 12
  config.predictor.num_mask_tokens = 1

  config.data.batch_size = 3072
  config.clip.frames = frames
  config.clip.fps = 4.0
  config.clip.resolution = resolution

  base.set_published_masks(config, short, long)

  # Weight decay .04 and momentum .99925 stay constant (the neutral values).
  if options['stage'] == 'pretrain':
    config.total_steps = 240_000
    config.learning_rate.update(
      kind='constant', start=1e-4, value=5.25e-4, warmup_steps=12_000
    )
  else:
    # The curve is 1.25 times as long as the run, which therefore ends at
    # 1.06e-4, not at 1e-6: so published.
    config.total_steps = 12_000
    config.schedule_scale = 1.25
    config.learning_rate.update(kind='linear', value=5.25e-4, final=1e-6)
  return config
