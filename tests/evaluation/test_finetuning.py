"""Training with labels: what layers learn at which rate, and scores."""

import jax
import numpy as np
import pytest

from configs import finetune
from vjepa_jax.evaluation import classification
from vjepa_jax.evaluation.finetuning import Classifier
from vjepa_jax.models import zoo
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.tasks.finetune import make_schedules
from vjepa_jax.training.optimizer import make_optimizer


def test_layers_move_by_their_share_of_the_rate():
  encoder = zoo.build_encoder('nano', tubelet=(2, 8, 8))
  assert encoder.depth == 2
  classifier = Classifier(encoder, AttentiveProbe(5, 2))
  tx = make_optimizer(layer_decay=0.5)
  abstract = jax.eval_shape(classifier.init, jax.random.key(0))
  ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract)
  # The first step of Adam is 1 in the direction of the gradient, and weights of
  # 1 decay by 2 but for biases and norms.
  updates, _ = jax.jit(
    lambda p: tx.update(p, tx.init(p), p, learning_rate=0.1, weight_decay=2.0)
  )(ones)
  moved = jax.tree.map(lambda update: -np.asarray(update), updates)
  blocks = moved['encoder']['transformer']['blocks']

  def check(leaf, rate, decays):
    expected = np.full(leaf.shape, 0.1 * rate * (3 if decays else 1))
    np.testing.assert_allclose(leaf, expected, rtol=1e-5)

  (embed,) = moved['encoder']['embed'].values()
  check(embed['kernel'], 0.5**3, True)
  check(embed['bias'], 0.5**3, False)
  for layer, rate in ((0, 0.5**2), (1, 0.5)):
    check(blocks['mlp']['fc1']['kernel'][layer], rate, True)
    check(blocks['attention']['query']['kernel'][layer], rate, True)
    check(blocks['norm2']['scale'][layer], rate, False)
  check(moved['encoder']['norm']['scale'], 1.0, False)
  check(moved['probe']['norm1']['scale'], 1.0, False)
  check(moved['probe']['classifier']['kernel'], 1.0, True)


@pytest.mark.parametrize(
  'variant,batch,epochs,peak,last',
  [
    ('k400', 256, 35, 2e-3, 1e-6),
    ('k400_h16', 1024, 25, 2e-3, 4e-5),
    ('ssv2', 256, 15, 5e-4, 1.5e-4),
    ('folder', 64, 50, 1.25e-4, 2.5e-7),
  ],
)
def test_rates_are_the_published_for_the_batch(
  variant, batch, epochs, peak, last
):
  config = finetune.get_config(f'{variant},backbone=some/where')
  assert config.backbone == 'some/where'
  assert (config.data.batch_size, config.total_epochs) == (batch, epochs)
  assert config.num_classes == {'k': 400, 's': 174, 'f': None}[variant[0]]
  rate = make_schedules(config, epochs * 100, 100.0)['learning_rate']
  assert float(rate(500)) == pytest.approx(peak, rel=1e-5)
  assert float(rate(250)) == pytest.approx(peak / 2, rel=0.01)
  assert float(rate(epochs * 100)) == pytest.approx(last, rel=1e-3)


def test_scores_of_known_predictions():
  # Three videos of class 0, the last of which is taken for 6; one of class 2,
  # whose own class comes sixth.
  shares = np.zeros((4, 7), np.float32)
  shares[:3, 0] = 0.5
  shares[2] = [0.2, 0, 0, 0, 0, 0, 0.8]
  shares[3] = [0.2, 0.2, 0.1, 0.2, 0.15, 0.15, 0]
  scores = classification.score(
    classification.Predictions(shares, np.array([0, 0, 0, 2]), 1)
  )
  assert scores['top1'] == pytest.approx(2 / 4)
  assert scores['top5'] == pytest.approx(3 / 4)
  assert scores['mean_class'] == pytest.approx((2 / 3 + 0) / 2)
  assert scores['cross_entropy'] == pytest.approx(
    -np.log([0.5, 0.5, 0.2, 0.1]).mean(), rel=1e-5
  )
  with pytest.raises(ValueError, match='none of 3 test videos could be read'):
    classification.score(
      classification.Predictions(shares[:0], np.zeros(0, int), 3)
    )
