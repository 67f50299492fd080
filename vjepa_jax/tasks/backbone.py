"""What tasks on top of a backbone share: its models, labelled videos."""

from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from vjepa_jax.data import pipeline, sources
from vjepa_jax.data.video import DecodeError
from vjepa_jax.errors import UserError
from vjepa_jax.interop.layout import Weights
from vjepa_jax.interop.load import init_untrained, read_clip, read_weights
from vjepa_jax.models import zoo
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.progress import make_bar
from vjepa_jax.training.checkpoint import (
  CheckpointError,
  read_model,
)
from vjepa_jax.training.state import hash_params


def open_split(config: ConfigDict, name: str) -> sources.Source:
  """Opens the labelled videos of one split."""
  if not config.data[name]:
    raise UserError(
      f'config.data.{name} is empty: give a manifest of `path label` lines, '
      'ArrayRecord shards with labels or tfds:name/split'
    )
  return sources.open_source(config.data[name])


def choose_step(config: ConfigDict, workdir: epath.PathLike) -> int | None:
  """Chooses a checkpoint of the backbone, for all of a run the same.

  The run of the backbone may go on: a run that resumes takes the step that it
  was started on. None of a backbone that is no workdir.
  """
  path = config.backbone
  if not path or not (epath.Path(path) / 'checkpoints').is_dir():
    return None
  try:
    _, model = read_model(workdir)
  except CheckpointError:
    model = {}  # The run starts.
  if model.get('backbone') == path and 'backbone_step' in model:
    return model['backbone_step']
  return read_model(path)[0]


def read_backbone(config: ConfigDict, step: int | None = None) -> Weights:
  """Reads the backbone, and fills in what the config leaves to it.

  Of a workdir the checkpoint of a step, None for the newest.

  Raises:
    UserError: The backbone cannot be used, or does not say what is asked.
  """
  if config.backbone:
    backbone = read_weights(
      config.backbone, which=config.which, with_predictor=False, step=step
    )
  else:
    backbone = Weights(zoo.build_encoder(**config.encoder))
  for name in ('frames', 'resolution'):
    if config.clip[name] is None:
      config.clip[name] = getattr(backbone, name)
    if config.clip[name] is None:
      raise UserError(f'the backbone does not say: set config.clip.{name}')
  clip = read_clip(config.backbone)
  for name in ('crop_scale', 'crop_aspect_ratio'):
    if config.clip[name] is None:
      config.clip[name] = clip[name]
  if config.clip.frame_step is None and config.clip.fps is None:
    config.clip.update(frame_step=clip['frame_step'], fps=clip['fps'])
  sides = [config.clip.frames, *[config.clip.resolution] * 2]
  backbone.encoder.compute_grid((1, *sides))  # raises if there is none
  return backbone


def describe_backbone(
  config: ConfigDict, params: Any, step: int | None = None
) -> dict[str, Any]:
  """Says which backbone a run is on, for `Session.open` to compare.

  `params` are those of the encoder, None for untrained ones. The fingerprint
  tells one backbone from another of its name.
  """
  if params is None:
    return {'backbone': 'random init', 'fingerprint': f'seed {config.seed}'}
  return {
    'backbone': config.backbone,
    'backbone_step': step,
    'fingerprint': hash_params(params),
  }


def place_encoder(
  encoder: Encoder, params: Any, seed: int, shardings: Any
) -> Any:
  """Places the parameters of an encoder, which every host has whole.

  None are untrained ones: those that pretraining with this seed starts from.
  """
  if params is not None:
    return jax.tree.map(place, params, shardings)
  return jax.jit(
    lambda: init_untrained(encoder, seed), out_shardings=shardings
  )()


def place(leaf: Any, sharding: jax.sharding.NamedSharding) -> jax.Array:
  """Spreads an array that every host has whole over all devices."""
  leaf = np.asarray(leaf, np.float32)
  return jax.make_array_from_callback(
    leaf.shape, sharding, lambda index: leaf[index]
  )


def count_classes(*labelled: sources.Source) -> int:
  """Reads all labels of videos: one more than the largest.

  Raises:
    UserError: A video has no label, or all have the same.
  """
  largest = 0
  for source in labelled:
    for i in make_bar(range(len(source)), desc='labels', leave=False):
      try:
        record = source[i]
      except DecodeError:
        continue  # Named where it is to be trained on.
      pipeline.check_label(record, 10**6)
      largest = max(largest, record.label)
  if not largest:
    raise UserError('all labels are 0: there is nothing to tell apart')
  return largest + 1
