"""What the compiler made of the step, and what the loop does with it."""

import contextlib
from types import SimpleNamespace
from unittest import mock

from etils import epath
import jax
import numpy as np
import pytest

from configs import vjepa1, vjepa2
from vjepa_jax.compilation import hlo
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.tasks.program import build_program, make_abstract_batch
from vjepa_jax.tasks.smoke import shrink
from vjepa_jax.training import loop
from vjepa_jax.training.objectives.base import Objective
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.state import init_state
from vjepa_jax.training.step import make_train_step
from vjepa_jax.training.telemetry import Telemetry, read_metrics

pytestmark = pytest.mark.usefixtures('optimized')

RECIPES = {'vjepa1': vjepa1, 'vjepa2': vjepa2}


class Compiled:
  """The real program of a shrunk recipe on eight devices."""

  def __init__(self, config, fsdp):
    self.config = config
    self.mesh = mesh_lib.make_mesh(fsdp)
    self.program = build_program(config, self.mesh, 100, 10)
    with jax.set_mesh(self.mesh):
      self.compiled = self.program.train_step.lower(
        self.program.abstract, make_abstract_batch(config)
      ).compile()
    self.text = self.compiled.as_text()

  def init(self):
    init = jax.jit(self.program.init, out_shardings=self.program.shardings)
    return init(jax.random.key(0))

  def make_batch(self, seed):
    """Makes a random batch on the host."""
    rng = np.random.default_rng(seed)

    def draw(array):
      if array.dtype == np.uint8:
        return rng.integers(0, 256, array.shape, np.uint8)
      rows = [rng.permutation(4 * 6 * 6)[: array.shape[1]] for _ in range(8)]
      return np.sort(np.stack(rows).astype(np.int32))

    return jax.tree.map(draw, make_abstract_batch(self.config))


@pytest.fixture(scope='module')
def build(tmp_path_factory):
  """Compiles each program once."""
  programs = {}

  def build(recipe, fsdp=1):
    if (recipe, fsdp) not in programs:
      workdir = epath.Path(tmp_path_factory.mktemp(recipe))
      config = shrink(RECIPES[recipe].get_config(), workdir)
      with pytest.MonkeyPatch.context() as patch:
        if fsdp > 1:
          config.encoder.size = 'micro'  # wide enough to be split
          patch.setattr(sharding, 'MIN_SHARDED_BYTES', 2**15)
        programs[recipe, fsdp] = Compiled(config, fsdp)
    return programs[recipe, fsdp]

  return build


@pytest.mark.parametrize('fsdp', [1, 4])
def test_the_state_is_updated_in_place(build, fsdp):
  step = build('vjepa2', fsdp)
  state = step.program.abstract
  num_bytes = sharding.count_bytes(state, step.program.shardings)
  # The compiler's own count of what outputs share with inputs.
  assert step.compiled.memory_analysis().alias_size_in_bytes >= num_bytes
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert num_bytes < whole / fsdp * 1.1


class _Brightness(Objective):
  """An objective that needs next to no memory."""

  averaged = None

  def init(self, key):
    return {'scale': {'scale': jax.numpy.ones(())}}

  def loss(self, params, frozen, batch, step=0):
    loss = params['scale']['scale'] * batch['pixels'].astype('float32').mean()
    return loss, {'loss': loss}


def test_microbatches_copy_no_more_than_themselves():
  objective, tx = _Brightness(), make_optimizer()
  schedules = {k: lambda _: 0.1 for k in ('learning_rate', 'weight_decay')}
  step = jax.jit(make_train_step(objective, tx, schedules, microbatches=8))
  state = init_state(objective, tx, jax.random.key(0))
  pixels = jax.ShapeDtypeStruct((32, 8, 64, 64, 3), np.uint8)
  memory = step.lower(state, {'pixels': pixels}).compile().memory_analysis()
  assert memory.temp_size_in_bytes < pixels.size / 2


@pytest.mark.parametrize('recipe', RECIPES)
def test_there_are_no_scatters(build, recipe):
  step = build(recipe)
  assert 'gather' in step.text  # of tokens, whose transpose would be a scatter
  assert hlo.count_scatters(step.text) == 0
  assert ' scatter(' not in step.text


def _get_collectives(step):
  return {key.split(':')[0] for key in hlo.count_collectives(step.text)}


@pytest.mark.parametrize('recipe', RECIPES)
def test_data_parallel_devices_only_add_up(build, recipe):
  step = build(recipe)
  assert _get_collectives(step) == {'all-reduce'}
  assert not any(f' {kind}' in step.text for kind in ('all-gather(', 'all-to-'))


def test_fsdp_gathers_parameters_and_moves_nothing_else(build):
  kinds = _get_collectives(build('vjepa2', 4))
  assert 'all-gather' in kinds
  assert kinds <= {'all-gather', 'all-reduce', 'reduce-scatter'}


class _Batches:
  """Takes the place of a feed: batches made beforehand."""

  wait_seconds = 0.0
  quarantine = SimpleNamespace(count=0)

  def __init__(self, make):
    self._make = make
    self.progress = {'samples': 0}

  def __next__(self):
    self.progress['samples'] += 8
    return self._make(self.progress['samples'])


def _run_loop(step, make_batch, num_steps, workdir, train_step=None):
  """Returns the steps at which the loop saved."""
  checkpoints = mock.Mock(is_due=lambda step: step % 8 == 0)
  telemetry = Telemetry(
    epath.Path(workdir), start_step=0, total_steps=num_steps, clips_per_step=8
  )

  def diagnose(target, video):
    return {
      'content_std': video.astype('float32').std(),
      'position_std': target['norm']['scale'].mean(),
      'token_covariance': jax.numpy.eye(4),
      'clip_covariance': jax.numpy.eye(4),
    }

  with jax.set_mesh(step.mesh), contextlib.closing(telemetry):
    loop.train(
      step.init(),
      train_step or step.program.train_step,
      _Batches(make_batch),
      loop.Cadence(num_steps, diagnose_every=3),
      start_step=0,
      progress={},
      checkpoints=checkpoints,
      telemetry=telemetry,
      diagnose=jax.jit(diagnose, out_shardings=sharding.replicate(step.mesh)),
    )
  return [call.args[0] for call in checkpoints.save.call_args_list]


def test_the_loop_compiles_once_and_keeps_no_old_state(build, tmp_path):
  step = build('vjepa2')
  compiled, seen, old = [], [], []

  def listen(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(event)

  def train_step(state, batch):
    seen.append(len(compiled))
    old.append(state)
    return step.program.train_step(state, batch)

  def make_batch(seed):
    return sharding.make_global(
      step.make_batch(seed), step.program.batch_sharding
    )

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    saved_steps = _run_loop(step, make_batch, 20, tmp_path, train_step)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  # Step and statistics, in the first two steps; then nothing any more.
  assert seen[-1] > 0 and set(seen[2:]) == {seen[-1]} == {len(compiled)}
  assert step.program.train_step._cache_size() == 1
  assert all(x.is_deleted() for state in old for x in jax.tree.leaves(state))
  assert saved_steps == [0, 8, 16, 20]
  assert [line['step'] for line in read_metrics(tmp_path)] == list(range(1, 21))


def test_the_loop_refuses_what_is_not_on_the_devices(build, tmp_path):
  step = build('vjepa2')
  with pytest.raises(RuntimeError, match='[Dd]isallowed host-to-device'):
    _run_loop(step, step.make_batch, 1, tmp_path)
