"""Recipes have the numbers that were published."""

import ast
import importlib
import itertools
import math

import pytest

from configs import vjepa21
from vjepa_jax.models import zoo
from vjepa_jax.tasks.program import get_grid, list_streams

# Recipes, '|' and where the numbers stand; then fields by group.
TABLE = """
vjepa1:l16 vjepa1:h16 vjepa1:h16_384 | V-JEPA 1, configs/pretrain
  config: seed=234 total_steps=90000 schedule_scale=1.25 clip_norm=10.0
  encoder: positions='sincos'
  predictor: num_heads=None num_mask_tokens=2
  clip: frames=16 frame_step=4 fps=None
  learning_rate: kind='cosine' start=2e-4 value=6.25e-4 final=1e-6
  learning_rate: warmup_steps=12000
  weight_decay: kind='cosine' value=.04 final=.4
  ema: kind='linear' value=.998 final=1.0
vjepa1:l16 | V-JEPA 1, configs/pretrain/vitl16
  encoder: size='large'
  clip: resolution=224
  data: batch_size=3072
vjepa1:h16 | V-JEPA 1, configs/pretrain/vith16
  encoder: size='huge'
  clip: resolution=224
  data: batch_size=3072
vjepa1:h16_384 | V-JEPA 1, configs/pretrain/vith16_384
  encoder: size='huge'
  clip: resolution=384
  data: batch_size=2400

vjepa2:l16 vjepa2:h16 vjepa2:g16 COOLDOWNS | V-JEPA 2, configs/train
  config: seed=239 clip_norm=None
  encoder: positions='rope_tiled' scale_init_by_depth=True
  predictor: num_heads=12
  data: batch_size=3072
  clip: fps=4.0 frame_step=None
  learning_rate: value=5.25e-4
  weight_decay: kind='constant' value=.04
  ema: kind='constant' value=.99925
vjepa2:l16 vjepa2:h16 vjepa2:g16 | V-JEPA 2, section 2: 252,000 steps in all
  config: total_steps=240000
  clip: frames=16 resolution=256
  learning_rate: kind='constant' start=1e-4 warmup_steps=12000
COOLDOWNS | V-JEPA 2, configs/train/*/cooldown
  config: total_steps=12000 schedule_scale=1.25
  clip: frames=64
  learning_rate: kind='linear' final=1e-6 warmup_steps=None
vjepa2:g16,stage=cooldown_256 | the same
  clip: resolution=256
vjepa2:g16,stage=cooldown_384 | the same
  clip: resolution=384
vjepa2:l16 | V-JEPA 2, table of models
  encoder: size='large'
vjepa2:h16 | V-JEPA 2, table of models
  encoder: size='huge'
vjepa2:g16 COOLDOWNS | V-JEPA 2, table of models
  encoder: size='giant'

vjepa1:l16 vjepa1:h16 vjepa1:h16_384 vjepa2:l16 vjepa2:g16 COOLDOWNS | both
  config: compute_dtype='bfloat16' mask_names=('short','long')
  encoder: tubelet=(2,16,16) init_std=.02 pixel_norm='imagenet'
  predictor: width=384 depth=12
  clip: num_clips=1 crop_scale=(.3,1.0) crop_aspect_ratio=(.75,1.35)
  masks.short: kind='multiblock' num_blocks=8 spatial_scale=(.15,.15)
  masks.short: aspect_ratio=(.75,1.5) temporal_scale=(1.0,1.0)
  masks.long: kind='multiblock' num_blocks=2 spatial_scale=(.7,.7)
  masks.long: aspect_ratio=(.75,1.5) temporal_scale=(1.0,1.0)
  objective: kind='vjepa'
  objective.vjepa: loss_exp=1.0 target_norm='layer' target_view='clip'
  objective.vjepa: variance_weight=0.0
  optimizer: kind='adamw' b1=.9 b2=.999 eps=1e-8

PAPER_21 RELEASE_21 | V-JEPA 2.1, configs/train_2_1
  config: seed=239 compute_dtype='bfloat16' clip_norm=None
  config: mask_names=('short','long')
  encoder: tubelet=(2,16,16) init_std=.02 pixel_norm='imagenet'
  encoder: positions='rope_rescaled' scale_init_by_depth=True modalities=True
  predictor: width=384 num_heads=12
  clip: fps=4.0 frame_step=None num_clips=1
  clip: crop_scale=(.3,1.0) crop_aspect_ratio=(.75,1.35) flip=.5
  image: crop_scale=(.3,1.0) crop_aspect_ratio=(.75,1.35) flip=.5
  masks.short: kind='multiblock' num_blocks=8 spatial_scale=(.15,.15)
  masks.short: aspect_ratio=(.75,1.5) temporal_scale=(1.0,1.0)
  masks.long: kind='multiblock' num_blocks=2 spatial_scale=(.7,.7)
  masks.image: kind='multiblock' num_blocks=10 spatial_scale=(.15,.15)
  masks.image: aspect_ratio=(.75,1.5) temporal_scale=(1.0,1.0)
  objective: kind='vjepa21'
  objective.vjepa: loss_exp=1.0 target_norm='layer'
  objective.vjepa21: context_weight=.5 image_share=.5
  weight_decay: kind='constant' value=.04
  ema: kind='constant' value=.99925
  optimizer: kind='adamw' b1=.9 b2=.999 eps=1e-8
PAPER_21 | V-JEPA 2.1, table of hyperparameters
  data: batch_size=128
  image: batch_size=2304
  objective.vjepa21: image_context_weight=.7
RELEASE_21 | V-JEPA 2.1, configs/train_2_1
  data: batch_size=3072
  image: resolution=256
  clip: resolution=256
  objective.vjepa21: image_context_weight=.5
vjepa21:l16 vjepa21:l16,stage=distill_1 | V-JEPA 2.1, hyperparameters
  config: total_steps=135000
  clip: frames=16 resolution=256
  image: resolution=256
  learning_rate: kind='constant' start=1e-4 value=5.25e-4 warmup_steps=12000
  objective.vjepa21: context_warmup_steps=(15000,30000) context_distance=True
MIXTURE_21 vjepa21:b16,stage=distill_2 | the same
  config: total_steps=12000 schedule_scale=1.0
  clip: frames=64 resolution=384
  image: resolution=512
  learning_rate: kind='linear' value=6e-4 final=1e-6 warmup_steps=None
  objective.vjepa21: context_warmup_steps=(0,0)
vjepa21:g16,numbers=release | V-JEPA 2.1, configs/train_2_1/vitg16/pretrain
  config: total_steps=300000
  clip: frames=16
  image: batch_size=4608
  learning_rate: kind='constant' start=1e-4 value=6e-4 warmup_steps=12000
  objective.vjepa21: context_warmup_steps=(15000,30000) context_distance=True
vjepa21:b16,stage=cooldown,numbers=release | the same, cooldown
  config: total_steps=12000 schedule_scale=1.25
  clip: frames=64
  image: batch_size=9216
  learning_rate: kind='linear' value=6e-4 final=1e-6 warmup_steps=None
  objective.vjepa21: context_warmup_steps=(0,0) context_distance=False
vjepa21:l16 | V-JEPA 2.1, section 3.2 and configs/train_2_1
  encoder: size='large' levels=True
  predictor: depth=24
vjepa21:g16,numbers=release | the same
  encoder: size='giant' levels=True
  predictor: depth=24
MIXTURE_21 | the same
  encoder: size='gigantic' levels=True
  predictor: depth=24
vjepa21:b16,stage=cooldown,numbers=release | configs/train_2_1/vitb16
  encoder: size='base' levels=True
  predictor: depth=12
vjepa21:l16,stage=distill_1 | V-JEPA 2.1, distillation
  encoder: size='large' levels=True
  predictor: depth=12
  config: init_average=False
vjepa21:b16,stage=distill_2 | the same
  encoder: size='base' levels=True
  predictor: depth=12
  config: init_average=True
  objective.vjepa21: context_distance=True
MIXTURE_21 | V-JEPA 2.1, as released
  objective.vjepa21: context_distance=False
MIXTURE_21 | V-JEPA 2.1, table 3
  data.sources: ssv2.weight=.17 kinetics.weight=.01 howto100m.weight=.1
  data.sources: yt_temporal_1b.weight=.72

action:droid_paper action:droid_release | V-JEPA 2, configs/train/vitg16/droid
  config: seed=239 total_steps=94500 weight_decay=.04 clip_norm=None
  config: compute_dtype='bfloat16' state_kind='pose' extrinsics=False
  encoder: size='giant' tubelet=(2,16,16)
  predictor: width=1024 depth=24 num_heads=16 positions='rope_tiled'
  predictor: init_std=.02 scale_init_by_depth=True
  objective: rollout_steps=2 rollout_prefix='first' detach=False loss_exp=1.0
  data: batch_size=256
  clip: resolution=256
  learning_rate: kind='linear' start=7.5e-5 value=4.25e-4 final=0.0
  learning_rate: warmup_steps=4500 decay_steps=4500
  optimizer: kind='adamw' b1=.9 b2=.999 eps=1e-8
action:droid_paper | V-JEPA 2, section 3.1
  clip: frames=16 fps=4.0 frame_step=None
action:droid_release | V-JEPA 2, configs/train/vitg16/droid-256px-8f
  clip: frames=8 fps=None frame_step=15

probe:k400,probe=v1 probe:ssv2,probe=v1 | V-JEPA 1, video_classification_frozen
  config: views=3 total_epochs=20.0
  data: batch_size=256
  clip: frames=16 frame_step=4 resolution=224 flip=0.0
  clip: crop_scale=(.08,1.0) crop_aspect_ratio=(.75,1.3333333333333333)
  probe: kind='attentive' depth=0 output_projection=True num_heads=None
  probe: learning_rates=(1e-3,) weight_decays=(.01,) clip_norm=1.0
probe:k400 probe:ssv2 probe:coin probe:diving48 probe:jester | V-JEPA 2, 5.2
  config: views=3
  clip: resolution=256
  probe: kind='attentive' depth=3 output_projection=False num_heads=16
  probe: clip_norm=None
probe:k400 probe:ssv2 probe:coin | V-JEPA 2, configs/eval
  config: total_epochs=20.0
  clip: frames=16 frame_step=4
  probe: learning_rates=(5e-3,3e-3,1e-3,3e-4,1e-4)
  probe: weight_decays=(.01,.1,.4,.8)
probe:diving48 probe:jester | V-JEPA 2, configs/eval
  config: total_epochs=100.0 segments=4
  clip: frames=32 frame_step=2
  data: batch_size=128
  probe: learning_rates=(1e-3,3e-4,1e-4) weight_decays=(.8,)
  layers_of_depth: 24=(17,19,21,23) 40=(24,29,34,39)
probe:k400 probe:k400,probe=v1 | both
  config: num_classes=400 segments=8
  data: batch_size=256
probe:ssv2 probe:ssv2,probe=v1 | both
  config: num_classes=174 segments=2
  data: batch_size=256
probe:coin | V-JEPA 2, configs/eval
  config: num_classes=180 segments=8
  data: batch_size=128
probe:diving48 | V-JEPA 2, configs/eval
  config: num_classes=48
probe:jester | V-JEPA 2, configs/eval
  config: num_classes=27
"""
GROUPS = {
  'COOLDOWNS': 'vjepa2:g16,stage=cooldown_256 vjepa2:g16,stage=cooldown_384',
  'PAPER_21': 'vjepa21:l16 vjepa21:l16,stage=distill_1 MIXTURE_21 '
  'vjepa21:b16,stage=distill_2',
  'MIXTURE_21': 'vjepa21:G16,stage=cooldown,data=mixture',
  'RELEASE_21': 'vjepa21:g16,numbers=release '
  'vjepa21:b16,stage=cooldown,numbers=release',
}
# Width, depth, heads, hidden features: src/models/vision_transformer.py.
SIZES = {
  'tiny': (192, 12, 3, 768),
  'small': (384, 12, 6, 1536),
  'base': (768, 12, 12, 3072),
  'large': (1024, 24, 16, 4096),
  'huge': (1280, 32, 16, 5120),
  'giant': (1408, 40, 22, 6144),
  'gigantic': (1664, 48, 26, 8192),
}


def _read_table():
  """Yields (recipe, field, value, source)."""
  recipes, source = [], ''
  table = TABLE
  for name, members in GROUPS.items():
    table = table.replace(name, members)
  for line in table.splitlines():
    group, _, fields = line.partition(': ')
    if '|' in line:
      recipes, source = (part.split() for part in line.split('|'))
    elif fields:
      prefix = group.strip().removeprefix('config')
      for recipe, field in itertools.product(recipes, fields.split()):
        name, _, value = field.partition('=')
        name = f'{prefix}.{name}'.lstrip('.')
        yield recipe, name, ast.literal_eval(value), ' '.join(source)


@pytest.mark.parametrize('recipe', dict.fromkeys(r for r, *_ in _read_table()))
def test_a_recipe_has_the_published_numbers(recipe):
  module, _, arg = recipe.partition(':')
  config = importlib.import_module(f'configs.{module}').get_config(arg)
  rows = [row[1:] for row in _read_table() if row[0] == recipe]
  assert len(rows) > 8
  for field, expected, source in rows:
    value = config
    for part in field.split('.'):
      value = value[part]
    value = tuple(value) if isinstance(value, list) else value
    assert value == expected, f'{field}: {source}'


# Shares of the tokens that are context, and that the predictor sees: means over
# draws of the published masks, cut to the shortest of a GPU's batch.
SHARES = {
  'l16': dict(short=(0.225, 0.69), long=(0.055, 0.755), image=(0.16, 0.66)),
  'l16,stage=cooldown': dict(
    short=(0.27, 0.77), long=(0.085, 0.8), image=(0.195, 0.69)
  ),
  'l16,stage=cooldown,numbers=release': dict(
    short=(0.23, 0.71), long=(0.06, 0.76), image=(0.16, 0.66)
  ),
}


@pytest.mark.parametrize('arg', SHARES)
def test_masks_show_and_use_the_published_shares_of_tokens(arg):
  config = vjepa21.get_config(arg)
  for stream, shape in list_streams(config).items():
    num_tokens = math.prod(get_grid(config, stream))
    for name in shape.mask_names:
      mask = config.masks[name]
      context, used = SHARES[arg][name]
      counts = mask.context_tokens, mask.context_tokens + mask.target_tokens
      assert counts[0] / num_tokens == pytest.approx(context, abs=0.03)
      assert counts[1] / num_tokens == pytest.approx(used, abs=0.02)


def test_named_sizes_are_the_published_ones():
  assert {name: tuple(zoo.SIZES[name]) for name in SIZES} == SIZES
