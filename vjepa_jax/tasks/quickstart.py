"""The quickstart: data, baselines, pretraining, probes, a table, a picture."""

from collections.abc import Callable
import dataclasses
import json
import time
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict
import numpy as np

from vjepa_jax.data import sources
from vjepa_jax.data.clip import Clips
from vjepa_jax.evaluation import baselines, batching, dense
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.plots import training as pictures
from vjepa_jax.sets import motion, package_videos
from vjepa_jax.tasks import pretrain as pretraining
from vjepa_jax.tasks.backbone import place_encoder
from vjepa_jax.tasks.program import build_objective, get_grid
from vjepa_jax.tasks.session import report
from vjepa_jax.training.telemetry import read_metrics

_IN_RESULTS = ('random_init', 'pretrained', 'pixels')
_SHOWN = 32  # clips whose features are drawn


def quickstart(
  config: ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict | None:
  """Runs `configs/quickstart.py`; writes `results.json` and `report.png`.

  With `config.smoke` its pretraining alone is run.
  """
  if config.smoke:
    return pretraining.pretrain(config, workdir, profile_steps)
  start = time.perf_counter()
  workdir = epath.Path(workdir)
  config = ConfigDict(config.to_dict())
  download_seconds = _write_data(config)
  train, test = pretraining.load_probe_clips(config, config.motion.max_clips)
  seconds = {'data': time.perf_counter() - start - download_seconds}

  mesh = mesh_lib.make_mesh(config.fsdp)
  encoder = build_objective(config, mesh).encoder
  places = sharding.replicate(mesh)
  untrained = place_encoder(encoder, None, config.seed, places)
  extract = batching.make_extract(
    batching.apply_encoder(encoder),
    mesh,
    config.probe.batch_size,
    'config.probe.batch_size',
  )
  probes = _Probes(config, encoder, extract, train, test)
  # What they reach on pixels and on an untrained encoder, first.
  path = workdir / 'baselines.json'
  if path.exists():
    scores = json.loads(path.read_text())
  else:
    logging.info('baselines: raw pixels, and the encoder before training')
    scores = probes.score_baselines(untrained)
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores, indent=2))
  print(probes.format(scores))

  train_start = time.perf_counter()
  state = pretraining.pretrain(config, workdir, profile_steps)
  if state is None:
    return None
  seconds['train'] = time.perf_counter() - train_start
  scores['pretrained'] = probes.score(state.target)
  seconds['total'] = time.perf_counter() - start - download_seconds
  metrics = read_metrics(workdir)
  results = _summarize(scores, metrics) | {'seconds': seconds}
  text = (
    f'{probes.format(scores)}\n'
    f'target std {results["target_std"]:.3f}, effective rank '
    f'{results["effective_rank"]:.1f} of {encoder.width}\n'
    f'{len(train.labels)} ({config.motion.few_clips}) labelled, '
    f'{len(test.labels)} held-out clips, '
    f'{seconds["total"]:.0f} s without downloads'
  )
  report(workdir, results, text)
  shown = test.videos[:_SHOWN]
  features = {
    'random init': extract(untrained, shown),
    'pretrained': extract(state.target, shown),
  }
  _draw(config, workdir / 'report.png', shown, features, metrics)
  return results


@dataclasses.dataclass
class _Probes:
  """Probes of the labelled clips, and what is to be said of them."""

  config: ConfigDict
  encoder: Encoder
  extract: Callable[[Any, np.ndarray], np.ndarray]
  train: Clips
  test: Clips

  def __post_init__(self):
    self._few = self.config.motion.few_clips
    self._halves = [
      dense.join_halves(clips, self.encoder, self.config.seed)
      for clips in (self.train, self.test)
    ]
    self._options = dict(
      num_heads=self.encoder.num_heads, steps=self.config.probe.attentive_steps
    )

  def score(self, params: Any) -> baselines.Scores:
    """Scores the features of an encoder."""
    features, places = (
      [self.extract(params, clips.videos) for clips in pair]
      for pair in ((self.train, self.test), self._halves)
    )
    labels = self.train.labels, self.test.labels
    found = baselines.score_features(
      labels, self._few, features, **self._options
    )
    return found | dense.score_places(*self._halves, places)

  def score_baselines(self, untrained: Any) -> dict[str, baselines.Scores]:
    """Scores what needs no training, an untrained encoder among it."""
    clips = self.train, self.test
    pixels, position = dense.score_baselines(*self._halves, self.encoder)
    return {
      'pixels': pixels
      | baselines.score_pixels(
        *clips, self.encoder, self._few, **self._options
      ),
      'differences': baselines.score_differences(*clips, self._few),
      'position': position,
      'random_init': self.score(untrained),
    }

  def format(self, scores: dict[str, baselines.Scores]) -> str:
    """Formats both tables."""
    table = baselines.format_table(scores, len(self.train.labels), self._few)
    return f'{table}\n{baselines.format_places(scores)}'


def _summarize(
  scores: dict[str, baselines.Scores], metrics: list[dict[str, float]]
) -> dict[str, Any]:
  """Returns accuracies by probe, and what the last diagnosis says."""
  diagnosed = [line for line in metrics if 'effective_rank' in line][-1]
  return {
    **{m: {e: scores[e][m] for e in _IN_RESULTS} for m in baselines.METHODS},
    **{
      m: {e: found[m] for e, found in scores.items() if m in found}
      for m in dense.METHODS
    },
    **{name: diagnosed[name] for name in ('target_std', 'effective_rank')},
  }


def _draw(
  config: ConfigDict,
  picture: epath.Path,
  videos: np.ndarray,
  features: dict[str, np.ndarray],
  metrics: list[dict[str, float]],
) -> None:
  """Draws clips, their masks and features, and the course of the run."""
  masks = pretraining.make_loader(config).mask_samplers
  pictures.draw_report(
    picture,
    videos=videos[:2],
    masks={
      name: sampler(np.random.default_rng(config.seed))
      for name, sampler in zip(config.mask_names, masks, strict=True)
    },
    features=features,
    grid=get_grid(config),
    metrics=metrics,
  )
  print(f'picture: {picture}')


def _write_data(config: ConfigDict) -> float:
  """Writes the motion set, and points the config at it.

  Returns:
    The seconds that downloads took.
  """
  folder = epath.Path(config.motion.folder)
  start, download_seconds = time.perf_counter(), 0.0
  if config.motion.videos:
    source = sources.FolderSource(config.motion.videos)
    videos = [record.video for record in source]
  else:
    videos = package_videos.fetch_package_videos(folder.parent / 'videos')
    download_seconds = time.perf_counter() - start
  motion.write_motion_set(
    folder,
    videos,
    num_train=config.motion.num_train,
    num_test=config.motion.num_test,
    seed=0,
  )
  train, test = (str(folder / f'{name}.csv') for name in ('train', 'test'))
  config.data.sources = dict(motion=dict(path=train, weight=1.0))
  config.probe.update(train=train, test=test)
  return download_seconds
