"""From a backbone to a decoder to pictures and numbers, by the commands."""

import json

from commands import run_command, start_command
import jax
import numpy as np
from PIL import Image
import pytest

from configs import decoder as recipe
from configs import small
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.sources import FolderSource
from vjepa_jax.interop import huggingface
from vjepa_jax.interop.layout import Weights, WeightsError
from vjepa_jax.interop.load import read_weights
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.models import zoo
from vjepa_jax.tasks import pretrain as pretraining
from vjepa_jax.tasks.decoder import train_decoder
from vjepa_jax.tools import convert, predict
from vjepa_jax.training.checkpoint import CheckpointError
from vjepa_jax.training.telemetry import read_metrics
from vjepa_jax.world.decoding import load_decoder


@pytest.fixture(scope='module')
def backbone(toy_videos, tmp_path_factory):
  """Workdir of a short run on rendered videos, held-out ones among them."""
  workdir = tmp_path_factory.mktemp('backbone')
  config = small.get_config('future')
  config.task = 'pretrain'
  config.encoder.update(size='nano', tubelet=(2, 8, 8))
  config.predictor.update(width=24, depth=1)
  config.data.sources = dict(toy=dict(path=str(toy_videos), weight=1.0))
  config.data.update(batch_size=8, num_threads=1)
  config.clip.update(frames=8, resolution=16)
  config.masks.future.update(context_tokens=8, target_tokens=8)
  config.total_steps = 2
  config.learning_rate.warmup_steps = 1
  config.diagnose_every_steps = 0
  assert pretraining.pretrain(config, workdir) is not None
  # The probe itself is not under test, where it looks is.
  path = workdir / 'config.json'
  written = json.loads(path.read_text())
  written['probe']['test'] = str(toy_videos)
  path.write_text(json.dumps(written))
  return workdir


def _make_config(source, **changes):
  config = recipe.get_config('small')
  config.backbone = str(source)
  config.decoder.update(width=32, depth=1, num_heads=2)
  config.data.update(batch_size=8, num_threads=1)
  config.statistics_clips = 16
  config.total_steps = 4
  config.fsdp = 2
  config.learning_rate.warmup_steps = 1
  config.log_every_steps = 1
  config.checkpoint.every_steps = 2
  config.held_out.update(every_steps=2, max_clips=8, batch_size=8)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def decoder(backbone, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('decoder')
  assert train_decoder(_make_config(backbone), workdir) is not None
  return workdir


def _predict(source, **options):
  flags = (f'--{name}={value}' for name, value in options.items())
  run_command(predict, str(source), *flags)


def _read(folder):
  return json.loads((folder / 'results.json').read_text())


def test_a_decoder_run_leaves_numbers_and_a_picture(decoder):
  lines = read_metrics(decoder)
  assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4]
  assert [line['step'] for line in lines if 'psnr' in line] == [0, 2, 4]
  results = _read(decoder)
  assert results['held_out'] and results['clips'] == 8
  assert results['decoded_psnr']['mean'] == pytest.approx(
    [line['psnr'] for line in lines if 'psnr' in line][-1], abs=1e-3
  )
  assert np.asarray(Image.open(decoder / 'decoder.png')).std() > 10


@pytest.mark.slow
def test_an_interrupted_decoder_goes_on_as_if_it_had_not(
  backbone, decoder, tmp_path
):
  half = _make_config(backbone, total_steps=2)
  # The schedule is that of the whole run.
  half.schedule_scale = 2.0
  train_decoder(half, tmp_path)
  # Its statistics are kept, whatever the config says of them now.
  train_decoder(_make_config(backbone, statistics_clips=8), tmp_path)
  expected, actual = (
    [line for line in read_metrics(path) if 'loss' in line][-1]
    for path in (decoder, tmp_path)
  )
  assert actual['step'] == 4
  assert actual['loss'] == pytest.approx(expected['loss'], rel=1e-5)
  assert _read(tmp_path)['decoded_psnr'] == pytest.approx(
    _read(decoder)['decoded_psnr'], rel=1e-5
  )


def test_a_clip_in_pictures_and_clips_in_numbers(
  backbone, decoder, toy_videos, tmp_path
):
  video = toy_videos.parent / '0001.mp4'
  _predict(
    backbone,
    video=video,
    evaluate=toy_videos,
    decode=decoder,
    roll=1,
    start=0.2,
    max_clips=6,
    batch_size=4,
    gallery_clips=6,
    output=tmp_path,
  )
  for name in ('prediction', 'neighbours', 'imagined'):
    assert np.asarray(Image.open(tmp_path / f'{name}.png')).std() > 10
  # A window of 8 frames, then 4 more, at the video's 10 frames a second.
  film = Image.open(tmp_path / 'imagined.gif')
  assert film.n_frames == 12 and film.info['duration'] == 100
  with open_video(str(tmp_path / 'imagined.mp4')) as film:
    assert film.num_frames == 12 and film.fps == pytest.approx(10)
    assert (film.height, film.width) == (216, 3 * 200)
  results = _read(tmp_path)
  single, many = results['video'], results['evaluation']
  assert single['visible_tokens'] == single['hidden_tokens'] == 8
  assert set(single['scores']['prediction']) == {'cosine', 'error', 'psnr'}
  assert len(single['neighbours']['ranks']) == 2
  assert many['clips'] == 6 and len(many['rolling']) == 2
  assert many['roll_through'] == 'pixels' and not many['left_out']
  # The first window is the prediction itself, batch by batch.
  for metric, value in many['rolling'][0]['prediction'].items():
    assert value == pytest.approx(
      many['scores']['prediction'][metric], rel=1e-4
    )


def test_without_a_decoder_there_are_features(backbone, toy_videos):
  video = toy_videos.parent / '0001.mp4'
  options = dict(hide='region', box='0,0,1,0.5')
  # What comes first is written first.
  with pytest.raises(FileNotFoundError):
    _predict(
      backbone, video=video, gallery=toy_videos, evaluate='/none', **options
    )
  results = _read(backbone / 'predict')['video']
  assert results['hidden_tokens'] == 8 and results['gallery_clips'] == 24
  assert set(results['scores']['prediction']) == {'cosine', 'error'}
  files = {path.name for path in (backbone / 'predict').iterdir()}
  assert files == {'prediction.png', 'neighbours.png', 'results.json'}


def test_videos_that_cannot_be_used_are_named(backbone, toy_videos, tmp_path):
  lines = [f'{toy_videos.parent / "0001.mp4"} 0', 'broken.mp4 1']
  (tmp_path / 'broken.mp4').write_bytes(b'no video at all ' * 99)
  (tmp_path / 'some.csv').write_text('\n'.join(lines))
  _predict(
    backbone,
    evaluate=tmp_path / 'some.csv',
    gallery=toy_videos,
    gallery_clips=16,
    output=tmp_path,
  )
  results = _read(tmp_path)['evaluation']
  assert results['clips'] == 1
  assert [f['name'] for f in results['left_out']] == ['broken.mp4']


@pytest.mark.parametrize(
  'options,message',
  [
    ({}, 'give --video=FILE, --evaluate=MANIFEST or both'),
    ({'video': 'VIDEO', 'context_frames': 3}, 'is not a multiple of the 2'),
    ({'video': 'VIDEO', 'context_frames': 8}, 'can show 1 to 3 of them, not 4'),
    ({'video': 'VIDEO', 'box': '1,x'}, '--box=1,x is not top,left'),
    ({'video': '/no/such.mp4'}, '/no/such.mp4 from --start=0.0: '),
    ({'video': 'VIDEO', 'start': 1.8}, 'take 0.80 s, the video has 2.40 s'),
    ({'video': 'VIDEO', 'gallery': 'VIDEO'}, 'give --gallery with 16 or more'),
    ({'video': 'VIDEO', 'decode': 'BACKBONE'}, 'holds no decoder: train one'),
    ({'video': 'VIDEO', 'decode': 'DECODER', 'frames': 4}, 'decodes grids of'),
    ({'video': 'VIDEO', 'roll': 1, 'hide': 'past'}, 'needs --hide=future'),
    (
      {'video': 'VIDEO', 'mask_token': 1},
      '--mask_token=1: the predictor has 1',
    ),
  ],
)
def test_errors_are_told_before_anything_is_predicted(
  backbone, decoder, toy_videos, tmp_path, options, message
):
  names = {
    'VIDEO': str(toy_videos.parent / '0001.mp4'),
    'BACKBONE': str(backbone),
    'DECODER': str(decoder),
  }
  options = {
    k: names.get(v, v) if isinstance(v, str) else v for k, v in options.items()
  }
  with pytest.raises(ValueError, match=message):
    _predict(backbone, gallery_clips=16, output=tmp_path, **options)
  assert not (tmp_path / 'results.json').exists()


def test_a_decoder_is_of_one_backbone(backbone, decoder):
  world = load_world_model(backbone)
  assert load_decoder(decoder, world).grid == (4, 2, 2)
  target = jax.tree.map(lambda x: x * 1.01, world.params['target'])
  world = world._replace(params=world.params | {'target': target})
  with pytest.raises(CheckpointError, match='these are of another encoder'):
    load_decoder(decoder, world)


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'backbone': ''}, 'config.backbone is empty: give a workdir'),
    ({'data.batch_size': 12}, 'a batch of 12 clips is not divisible by 8'),
    ({'decoder.num_heads': 3}, 'decoder width 32 is not divisible by its 3'),
    ({'loss_exp': 3.0}, 'config.loss_exp is 1 or 2, not 3'),
    ({'clip.resolution': 20}, 'config.clip: height of the clip, 20, is not'),
  ],
)
def test_errors_in_the_recipe(backbone, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    train_decoder(_make_config(backbone, **changes), tmp_path)
  assert not (tmp_path / 'checkpoints').exists()


def test_both_variants_of_the_recipe():
  for variant in ('small', 'large'):
    config = recipe.get_config(variant)
    assert config.decoder.width % config.decoder.num_heads == 0
    assert config.learning_rate.warmup_steps < config.total_steps
  with pytest.raises(ValueError, match="variant 'huge' is not one of"):
    recipe.get_config('huge')


def test_a_hugging_face_folder_is_a_world_model(toy_videos, tmp_path):
  pytest.importorskip('safetensors', reason='the extra parity has safetensors')
  encoder = zoo.build_encoder(
    'nano', tubelet=(2, 8, 8), positions='rope_tiled', scale_init_by_depth=True
  )
  predictor = zoo.build_predictor(encoder, num_heads=2, width=24, depth=1)
  video = np.zeros((1, 4, 16, 16, 3), np.uint8)
  ids = np.zeros((1, 1), np.int32)

  @jax.jit
  def init(key):
    params = encoder.init(key, video)['params']
    features = encoder.apply({'params': params}, video, ids)
    return params, predictor.init(key, features, ids, ids, (2, 2, 2))['params']

  params = init(jax.random.key(0))
  huggingface.save_pretrained(
    tmp_path,
    Weights(encoder, params[0], predictor, params[1], resolution=16, frames=4),
  )
  world = load_world_model(tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal,
    world.params,
    {'encoder': params[0], 'target': params[0], 'predictor': params[1]},
  )
  assert (world.target_norm, world.clip, world.sources) == ('layer', None, ())
  path = FolderSource(str(toy_videos.parent))[0].video
  with pytest.raises(ValueError, match='give frame_step or fps'):
    _predict(tmp_path, video=path)
  # Nothing else is known: nearest frames are those of the video itself.
  _predict(tmp_path, video=path, frame_step=1)
  results = _read(tmp_path / 'predict')['video']
  assert results['gallery'] == path and results['gallery_clips'] == 6
  assert 'average' not in results['scores']


def test_an_encoder_alone_predicts_nothing(backbone, tmp_path):
  weights = read_weights(backbone, with_predictor=False)
  convert.write_workdir(tmp_path, weights)
  with pytest.raises(WeightsError, match='has no predictor: prediction needs'):
    load_world_model(tmp_path)


def test_flags_of_the_command_reach_it(backbone, toy_videos, tmp_path):
  out = start_command(
    'predict',
    backbone,
    f'--evaluate={toy_videos}',
    '--max_clips=2',
    '--hide=past',
    '--context_frames=6',
    '--gallery_clips=16',
    f'--output={tmp_path}',
  )
  assert out.returncode == 0, out.stderr
  results = _read(tmp_path)['evaluation']
  assert results['hidden_tokens'] == 4 and results['clips'] == 2
  table = [line.split('  ')[0] for line in out.stdout.splitlines()]
  assert {'imagined', 'last frame repeated', 'untrained predictor'} <= set(
    table
  )
