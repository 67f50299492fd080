"""A new objective is its file, its config and a line in the table of kinds."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from configs import vjepa1
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.tasks import program
from vjepa_jax.tasks.pretrain import pretrain
from vjepa_jax.tasks.smoke import shrink
from vjepa_jax.training.objectives import base
from vjepa_jax.training.objectives.targets import FeatureTargets, measure_cosine
from vjepa_jax.training.telemetry import read_metrics


# The file of the objective.
@dataclasses.dataclass(frozen=True)
class Cosine(base.Objective):
  """Regression of the direction of the mean feature of what is hidden."""

  encoder: Encoder
  predictor: Predictor
  margin: float

  def init(self, key):
    return base.init_models(key, self.encoder, self.predictor)

  def loss(self, params, frozen, batch, step=0):
    stream = batch['video']
    targets = FeatureTargets(self.encoder).encode(frozen, stream)
    _, predictions = base.predict(self.encoder, self.predictor, params, stream)
    pairs = zip(predictions, targets, strict=True)
    cosines = [measure_cosine(p.mean(axis=1), t.mean(axis=1)) for p, t in pairs]
    loss = jnp.maximum(1.0 - sum(cosines) / len(cosines) - self.margin, 0.0)
    return loss, {'loss': loss}


def build(setup, **options):
  return Cosine(setup.encoder, setup.build_predictor(), **options)


# Its config.
def get_config():
  config = vjepa1.get_config('l16')
  config.objective.update(kind='cosine', cosine=dict(margin=0.01))
  config.optimizer.kind = 'muon'
  return config


def test_it_trains_and_resumes_with_muon(tmp_path, monkeypatch):
  # The line.
  monkeypatch.setitem(program.OBJECTIVES, 'cosine', (build,))
  config = shrink(get_config(), tmp_path)
  config.probe.update(train='', test='')
  for steps in (2, 4):
    config.total_steps = steps
    config.schedule_scale = 4 / steps  # the same program
    state = pretrain(config, tmp_path / 'run')
    assert int(state.step) == steps
  losses = [line['loss'] for line in read_metrics(tmp_path / 'run')]
  assert len(losses) == 4 and np.isfinite(losses).all()
  assert losses[-1] < losses[0]
  momentum = state.opt_state.inner_states['matrices'].inner_state[0].mu
  kernels = momentum['encoder']['transformer']['blocks']['mlp']['fc1']
  assert np.abs(kernels['kernel']).max() > 0
