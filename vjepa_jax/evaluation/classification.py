"""Classifies videos by several clips each, on all devices of all hosts."""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import itertools
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.sharding import Mesh
import numpy as np

from vjepa_jax.data import decode, shards, sources
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.features import join_segments
from vjepa_jax.data.readers import Journal
from vjepa_jax.data.records import check_label
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation import batching
from vjepa_jax.evaluation.reading import Reader, open_reader
from vjepa_jax.progress import make_bar


class Predictions(NamedTuple):
  """What was computed of labelled videos, in their order."""

  # What `apply` returned, `[N, ...]`: of a classifier the probabilities,
  # float32 `[N, classes]`; of a grid of probes `[N, probes, classes]`.
  outputs: Any
  labels: np.ndarray  # int [N]
  left_out: int  # videos that could not be read, not among the N

  def count(self) -> dict[str, int]:
    """Counts test videos for `results.json`."""
    return {'test_videos': len(self.labels), 'left_out': self.left_out}


def make_predict(
  apply: Callable[[Any, jax.Array], Any],
  num_classes: int,
  mesh: Mesh,
  batch_size: int,
  *,
  num_threads: int = 2,
) -> Callable[[Any, sources.Source, ClipOptions | None], Predictions]:
  """Makes the function (parameters, videos, how to cut) -> predictions.

  In place of videos it takes a `FeatureSource`, and None for how to cut.

  Args:
    apply: Maps parameters and videos uint8 `[V, clips, T, H, W, 3]`, or else
      features `[V, 1, tokens, D]`, to a tree of arrays `[V, ...]`.
    num_classes: Labels are below it.
    mesh: Batches are split over all its devices.
    batch_size: Videos at a time, over all hosts; each host decodes its own.
    num_threads: Decoding threads of a host.

  Raises:
    UserError: The batch does not split evenly over the devices.
  """
  map_batches = batching.make_map_batches(
    lambda params, batch: (apply(params, batch[0]), batch[1]),
    mesh,
    batch_size,
    'config.evaluation.batch_size',
  )
  own = batching.get_own_rows(mesh, batch_size)

  def predict(params, source, options):
    batches = load_batches(
      source, options, num_classes, batch_size, own, num_threads
    )
    batches = make_bar(
      batches,
      total=-(-len(source) // batch_size),
      desc='classifying',
      unit='batch',
      leave=False,
    )
    parts = list(map(batching.fetch, map_batches(params, batches)))
    outputs, labels = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    good = labels >= 0
    return Predictions(
      jax.tree.map(lambda x: x[good], outputs),
      labels[good],
      len(source) - int(good.sum()),
    )

  return predict


def load_batches(
  source: sources.Source,
  options: ClipOptions | None,
  num_classes: int,
  batch_size: int,
  own: Sequence[int],
  num_threads: int,
  journal: Journal | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the rows `own` of all batches of labelled videos or features.

  These are clips uint8 `[rows, clips, T, H, W, 3]`, see `read_timed_clips`, or
  features `[rows, 1, tokens, D]`; and labels int32 `[rows]`, -1 of what cannot
  be read or is past the end. The journal has what killed this process before.
  """
  starts = range(0, len(source), batch_size)
  indices = (start + int(row) for start in starts for row in own)
  with (
    open_reader(source, options, journal or Journal()) as reader,
    futures.ThreadPoolExecutor(num_threads) as pool,
  ):
    read = _make_read(reader, num_classes)
    videos = shards.map_ahead(pool, read, indices, len(own) + num_threads)
    for _ in starts:
      clips, labels = zip(*itertools.islice(videos, len(own)), strict=True)
      yield np.stack(clips), np.array(labels, np.int32)


def _make_read(reader: Reader, num_classes: int):
  """Makes the function from an index to (clips or features, label).

  The label is -1 of a video that cannot be read or is not there.
  """
  source, options = reader.source, reader.options
  if options is None:
    empty = np.zeros_like(join_segments(sources.find_usable(source).features))
  else:
    clips = options.num_clips * options.views
    sides = options.frames, *[options.resolution] * 2
    empty = np.zeros((clips, *sides, 3), np.uint8)

  def read(index):
    if index >= len(source):
      return empty, -1
    try:
      record = source[index]
      check_label(record, num_classes)
      if options is None:
        return join_segments(record.features), record.label
      return reader.cut(record, index)[0], record.label
    except decode.DecodeError as error:
      logging.warning('left out %s: %s', error.name or record.name, error)
      return empty, -1

  return read


def score(predictions: Predictions) -> dict[str, float]:
  """Scores probabilities: shares of videos, and the mean over the classes.

  Raises:
    UserError: No video could be read.
  """
  probabilities, labels, left_out = predictions
  if not len(labels):
    raise UserError(f'none of {left_out} test videos could be read')
  order = np.argsort(-probabilities, axis=1, kind='stable')
  places = (order == labels[:, None]).argmax(axis=1)
  hits = places == 0
  by_class = [hits[labels == label].mean() for label in np.unique(labels)]
  likelihoods = probabilities[np.arange(len(labels)), labels]
  return {
    'top1': float(hits.mean()),
    'top5': float((places < 5).mean()),
    'mean_class': float(np.mean(by_class)),
    'cross_entropy': float(-np.log(np.maximum(likelihoods, 1e-9)).mean()),
  }


def describe(results: dict[str, Any]) -> tuple[str, str]:
  """Says in words what a classifier scores, and on which videos."""
  scores = (
    'top-1 {top1:.3f}, top-5 {top5:.3f}, mean over classes {mean_class:.3f}'
  )
  videos = '{test_videos} test videos'
  if results['left_out']:
    videos += ', {left_out} left out'
  return scores.format_map(results), videos.format_map(results)
