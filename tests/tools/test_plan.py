"""The plan command: what it reads, prints and recommends."""

import importlib.util
import json

from commands import start_command
import jax
import pytest

from configs import action, vjepa1, vjepa2
from vjepa_jax.compilation import topology
from vjepa_jax.compilation.plan import choose_plan, format_plan
from vjepa_jax.errors import UserError
from vjepa_jax.parallel import sharding
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.parallel.replicas import measure_readers
from vjepa_jax.tasks.program import build_program, make_abstract_batch
from vjepa_jax.tools import plan

pytestmark = pytest.mark.usefixtures('optimized')

tpu_aot = pytest.mark.tpu_aot
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="libtpu is not installed: pip install -e '.[tpu]'",
)


def _toy(config, **changes):
  """Shrinks a recipe to something that compiles in seconds."""
  config.encoder.size = 'nano'
  config.predictor.update(width=64, depth=2, num_heads=2)
  config.clip.update(frames=4, resolution=64)
  for name, (context, target) in (('short', (8, 16)), ('long', (16, 8))):
    config.masks[name].update(context_tokens=context, target_tokens=target)
  config.data.batch_size = 32
  config.update(changes)
  return config


@pytest.fixture(scope='module', params=[(vjepa1, 'l16'), (vjepa2, 'g16')])
def toy_plan(request):
  module, variant = request.param
  config = _toy(module.get_config(variant), fsdp=2)
  return plan.make_plan(config, 'v5e:2x2')


@tpu_aot
@needs_libtpu
def test_toy_recipes_compile_for_a_tpu(toy_plan):
  assert toy_plan['fits'] and toy_plan['devices'] == 4
  assert toy_plan['attention'] == 'pallas'
  assert toy_plan['mesh'] == {'data': 2, 'fsdp': 2}
  assert toy_plan['scatters'] == 0
  # Gradients are summed in float32; in bfloat16 only weights are moved.
  kinds = toy_plan['collectives']
  assert kinds['all-reduce:f32']['mib'] > 0
  assert 'all-to-all' not in ' '.join(kinds)
  reduced = kinds.get('all-reduce:bf16', {'mib': 0.0})['mib']
  assert reduced < 0.05 * kinds['all-reduce:f32']['mib']
  # The whole state is given back in place.
  state = sum(toy_plan['state_gib'].values())
  assert toy_plan['donated_gib'] >= state  # with the padding of its tiles
  # Recomputation and zero lanes cost something, nothing else does.
  assert toy_plan['flops_per_clip'] > toy_plan['minimum_flops_per_clip']
  for part in (
    'target_encoder',
    'context_encoder',
    'context_encoder_backward',
    'predictor',
    'predictor_backward',
    'optimizer',
    'ema',
  ):
    assert toy_plan['parts'][part] > 0
  assert 0 < toy_plan['estimated_mfu'] < 1
  text = format_plan(toy_plan)
  assert 'fits' in text and 'predictor_backward' in text


@tpu_aot
@needs_libtpu
def test_slices_are_joined_along_data():
  devices = topology.get_devices('v5e:2x2', num_slices=2)
  mesh = make_mesh(4, devices)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 4}
  for row in mesh.devices:
    assert len({d.slice_index for d in row}) == 1
  with pytest.raises(ValueError, match='in each of 2 slices do not split'):
    make_mesh(8, devices)


@tpu_aot
@needs_libtpu
@pytest.mark.parametrize('fsdp,hosts', [(4, 1), (8, 2)])
def test_one_slice_reads_a_checkpoint_each_host_its_part(
  monkeypatch, fsdp, hosts
):
  monkeypatch.setattr(sharding, 'MIN_SHARDED_BYTES', 0)
  mesh = make_mesh(fsdp, topology.get_devices('v5e:2x4', num_slices=2))
  program = build_program(_toy(vjepa1.get_config('l16')), mesh, 90_000, 300)
  states = program.abstract, program.shardings
  assert measure_readers(*states, mesh) == {
    'hosts': hosts,
    'slices': 1,
    'gib_a_host': pytest.approx(_count(program) / hosts / 2**30, rel=0.01),
  }


def _count(program):
  state = program.abstract.replace(step=None, frozen=None)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@pytest.mark.slow
@tpu_aot
@needs_libtpu
def test_a_predictor_with_actions_is_planned():
  config = action.get_config('droid_release')
  config.encoder.size = 'nano'
  config.predictor.update(width=64, depth=2, num_heads=2)
  config.clip.update(frames=4, resolution=64)
  config.data.batch_size = 8
  answer = plan.make_plan(config, 'v5e:2x2')
  assert answer['fits'] and answer['attention'] == 'pallas'
  assert {'parameters', 'moments', 'frozen'} == set(answer['state_gib'])
  config.data.batch_size = 9
  with pytest.raises(UserError, match='a batch of 9 clips is not divisible'):
    plan.make_plan(config, 'v5e:2x2')


@tpu_aot
@needs_libtpu
def test_out_of_memory_is_an_answer(tmp_path, monkeypatch, capsys):
  config = _toy(vjepa1.get_config('l16'))
  config.encoder.size = 'base'
  config.remat = 'none'
  config.data.batch_size = 4 * 4096
  config.clip.resolution = 128
  answer = plan.make_plan(config, 'v5e:2x2')
  assert not answer['fits']
  assert answer['hbm_gib'] > answer['hbm_limit_gib'] == 15.75
  assert answer['estimated_mfu'] is None
  assert 'DOES NOT FIT' in format_plan(answer)
  advice = plan.advise(answer)
  assert '--config.remat=full' in advice and 'microbatches=2' in advice


@pytest.mark.parametrize(
  'name,message',
  [
    ('v9:2x2', "'v9:2x2' is not KIND:SHAPE with KIND one of v4, v5e"),
    pytest.param(
      'v5e:3x5', "topology 'v5e:3x5'", marks=[tpu_aot, needs_libtpu]
    ),
  ],
)
def test_unknown_topologies_are_named(name, message):
  with pytest.raises(ValueError, match=message):
    topology.get_devices(name)


def test_a_missing_compiler_names_its_extra(monkeypatch):
  def fail(*args, **options):
    raise NotImplementedError('no such platform')

  monkeypatch.setattr(topology.topologies, 'get_topology_desc', fail)
  with pytest.raises(UserError, match=r'\.\[tpu\]'):
    topology.get_devices('v5e:2x2')
  with pytest.raises(UserError, match=r'\.\[cuda\]'):
    topology.get_devices('h100:1x1x8')


def test_fit_takes_the_fastest_that_leaves_room():
  def make(fits, gib, seconds):
    return {
      'fits': fits,
      'hbm_gib': gib,
      'hbm_limit_gib': 16.0,
      'estimated_seconds': {'total': seconds},
    }

  plans = [make(False, 40, None), make(True, 15.9, 0.3), make(True, 9, 0.5)]
  assert choose_plan(plans) is plans[2]
  assert choose_plan(plans[:2]) is None
  variants = plan.list_variants(vjepa1.get_config('l16'), num_devices=8)
  assert {(v.fsdp, v.remat) for v in variants} == {
    (fsdp, remat) for fsdp in (1, 8) for remat in ('none', 'attention', 'full')
  }


@pytest.mark.slow
@tpu_aot
@needs_libtpu
@pytest.mark.parametrize(
  'module,arg,name,fsdp,limit',
  [
    (vjepa1, 'l16', 'v5e:16x16', 1, 7.3),
    (vjepa1, 'h16', 'v5e:16x16', 16, 3.5),
    (vjepa2, 'g16', 'v5e:16x16', 16, 3.6),
    (vjepa2, 'variant=g16,stage=cooldown_256', 'v5p:8x8x8', 8, 10.5),
  ],
)
def test_recipes_fit_their_pods(module, arg, name, fsdp, limit):
  config = module.get_config(arg)
  config.fsdp = fsdp
  answer = plan.make_plan(config, name)
  assert answer['hbm_gib'] <= limit
  assert answer['scatters'] == 0
  if arg == 'l16':
    assert answer['estimated_mcycles'] < 500


@pytest.mark.slow
@tpu_aot
@needs_libtpu
def test_command_prints_the_table_and_writes_json(tmp_path):
  file = tmp_path / 'plan.json'
  done = start_command(
    'plan',
    '--topology=v5e:2x2',
    '--config=configs/vjepa1.py:l16',
    '--config.data.batch_size=8',
    '--config.encoder.size=tiny',
    f'--json={file}',
  )
  assert 'estimated_mfu' in done.stdout
  answer = json.loads(file.read_text())
  assert {
    'hbm_gib',
    'hbm_limit_gib',
    'estimated_mcycles',
    'estimated_mfu',
    'flops_per_clip',
    'minimum_flops_per_clip',
    'scatters',
    'collectives',
    'compile_seconds',
  } <= set(answer)


def test_batches_must_split_into_devices_and_microbatches():
  config = _toy(vjepa1.get_config('l16'), microbatches=3)
  mesh = make_mesh(1, jax.devices()[:2])
  with pytest.raises(ValueError, match='2 data shards x 3 microbatches'):
    build_program(config, mesh, 100_000, 1000)
  batch = make_abstract_batch(config)
  assert batch['video']['pixels'].shape == (32, 4, 64, 64, 3)
  assert batch['video']['masks'][0]['target'].shape == (32, 16)
