"""The quickstart: data, baselines, pretraining, probes, a table, a picture."""

import json
import time

from absl import logging
from etils import epath
from ml_collections import config_dict
import numpy as np

from vjepa_jax.data import sources
from vjepa_jax.evaluation import baselines, batching
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.plots import training as pictures
from vjepa_jax.sets import motion, package_videos
from vjepa_jax.tasks import pretrain as pretraining
from vjepa_jax.tasks.backbone import place_encoder
from vjepa_jax.tasks.program import build_objective, get_grid
from vjepa_jax.training.telemetry import read_metrics

_IN_RESULTS = ('random_init', 'pretrained', 'pixels')


def quickstart(
  config: config_dict.ConfigDict,
  workdir: epath.PathLike,
  profile_steps: tuple[int, int] | None = None,
) -> dict | None:
  """Runs the quickstart and writes `results.json` and `report.png`.

  Args:
    config: `configs/quickstart.py`. With `smoke` its pretraining alone is run.
    workdir: Directory of the run; an interrupted run resumes.
    profile_steps: First and last step to trace.

  Returns:
    What `results.json` holds; None if preempted.
  """
  if config.smoke:
    return pretraining.pretrain(config, workdir, profile_steps)
  start = time.perf_counter()
  workdir = epath.Path(workdir)
  config = config_dict.ConfigDict(config.to_dict())
  train, test, download_seconds = _write_data(config)
  seconds = {'data': time.perf_counter() - start - download_seconds}

  mesh = mesh_lib.make_mesh(config.fsdp)
  encoder = build_objective(config, mesh).encoder
  untrained = place_encoder(
    encoder, None, config.seed, sharding.replicate(mesh)
  )
  extract = batching.make_extract(
    batching.apply_encoder(encoder),
    mesh,
    config.probe.batch_size,
    'config.probe.batch_size',
  )
  few = config.motion.few_clips
  options = dict(
    num_heads=encoder.num_heads, steps=config.probe.attentive_steps
  )

  def score(params):
    features = (extract(params, clips.videos) for clips in (train, test))
    return baselines.score_features(
      *features, train.labels, test.labels, few=few, **options
    )

  # What the same probes reach on pixels and on an untrained encoder, first.
  path = workdir / 'baselines.json'
  if path.exists():
    scores = json.loads(path.read_text())
  else:
    logging.info('baselines: raw pixels, and the encoder before training')
    scores = {
      'pixels': baselines.score_pixels(train, test, encoder, few, **options),
      'differences': baselines.score_differences(train, test, few),
      'random_init': score(untrained),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores, indent=2))
  print(baselines.format_table(scores, len(train.labels), few))

  train_start = time.perf_counter()
  state = pretraining.pretrain(config, workdir, profile_steps)
  if state is None:
    return None
  seconds['train'] = time.perf_counter() - train_start
  scores['pretrained'] = score(state.target)
  seconds['total'] = time.perf_counter() - start - download_seconds
  results = _write_results(workdir, scores, seconds)
  shown = test.videos[:32]
  features = (extract(params, shown) for params in (untrained, state.target))
  _draw(workdir, config, shown[:2], *features)
  print(baselines.format_table(scores, len(train.labels), few))
  print(
    f'target std {results["target_std"]:.3f}, effective rank '
    f'{results["effective_rank"]:.1f} of {encoder.width}\n'
    f'{len(train.labels)} ({few}) labelled, {len(test.labels)} held-out clips, '
    f'{seconds["total"]:.0f} s without downloads\n'
    f'results: {workdir / "results.json"}\npicture: {workdir / "report.png"}'
  )
  return results


def _write_results(workdir, scores, seconds):
  """Writes `results.json`: accuracies, time, and how collapsed features are."""
  diagnosed = [m for m in read_metrics(workdir) if 'effective_rank' in m][-1]
  results = {
    **{m: {e: scores[e][m] for e in _IN_RESULTS} for m in baselines.METHODS},
    'target_std': diagnosed['target_std'],
    'effective_rank': diagnosed['effective_rank'],
    'seconds': seconds,
  }
  (workdir / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
  return results


def _write_data(config):
  """Writes the motion set and points the config at it.

  Returns:
    Labelled training and test clips, and the seconds of the downloads.
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
  config.data.sources = dict(
    motion=dict(path=str(folder / 'train.csv'), weight=1.0)
  )
  config.probe.update(
    train=str(folder / 'train.csv'), test=str(folder / 'test.csv')
  )
  count = config.motion.max_clips
  return *pretraining.load_probe_clips(config, count), download_seconds


def _draw(workdir, config, videos, untrained, pretrained):
  """Draws report.png over the first held-out clips."""
  loader = pretraining.make_loader(config)
  masks = {
    name: sampler(np.random.default_rng(config.seed))
    for name, sampler in zip(
      config.mask_names, loader.mask_samplers, strict=True
    )
  }
  pictures.draw_report(
    workdir / 'report.png',
    videos=videos,
    masks=masks,
    features={'random init': untrained, 'pretrained': pretrained},
    grid=get_grid(config),
    metrics=read_metrics(workdir),
  )
