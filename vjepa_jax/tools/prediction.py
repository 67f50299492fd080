"""What `vjepa_jax.tools.predict` does: a clip in pictures, clips in numbers."""

from collections.abc import Sequence
import contextlib
import dataclasses
import glob
import json
import os
import pathlib
from typing import Any

import numpy as np

from vjepa_jax.data import decode, sources
from vjepa_jax.data.clips import Clips, load_clips, read_from, read_windows
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.models.tubelets import patchify, unpatchify
from vjepa_jax.plots import prediction as plots
from vjepa_jax.plots.figures import choose_steps
from vjepa_jax.plots.training import project_features
from vjepa_jax.world.baselines import fill_pixels
from vjepa_jax.world.decoding import load_decoder
from vjepa_jax.world.masks import choose_hidden
from vjepa_jax.world.model import complete_clip, measure_space
from vjepa_jax.world.predict import (
  MaskedPredictor,
  choose_mask_token,
  join_tokens,
  score_features,
)
from vjepa_jax.world.retrieval import Retrieval
from vjepa_jax.world.rollout import (
  check_rollout,
  count_frames,
  make_render,
  roll_out,
)
from vjepa_jax.world.scores import Scorer, format_scores, join_scores

# Below it the deviation at a position says little.
_FEWEST_CLIPS = 16
_NEIGHBOURS = 5


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked for; see the flags of `vjepa_jax.tools.predict`."""

  source: str
  video: str | None = None
  start: float = 0.0
  evaluate: str | None = None
  max_clips: int | None = None
  output: str | None = None
  hide: str = 'future'
  context_frames: int | None = None
  box: Sequence[float | str] = (0.25, 0.25, 0.5, 0.5)
  frames: int | None = None
  resolution: int | None = None
  frame_step: int | None = None
  fps: float | None = None
  mask_token: int | None = None
  decode: str | None = None
  roll: int = 0
  roll_through: str | None = None
  gallery: str | None = None
  gallery_clips: int = 256
  batch_size: int = 16
  positions: str | None = None
  predictor_heads: int | None = None


def run(request: Request) -> dict[str, Any]:
  """Does what is asked for, and writes `results.json`.

  Returns:
    What `results.json` holds: 'video' and 'evaluation', one of which may be of
    an earlier run.

  Raises:
    ValueError: Something does not fit; one line says what.
  """
  if request.video is None and request.evaluate is None:
    raise ValueError('give --video=FILE, --evaluate=MANIFEST or both')
  folder = pathlib.Path(request.source)
  output = folder / 'predict' if folder.is_dir() else pathlib.Path('predict')
  if request.output:
    output = pathlib.Path(request.output)
  path = output / 'results.json'
  results = json.loads(path.read_text()) if path.exists() else {}

  def write(section, part):
    results[section] = part
    path.write_text(json.dumps(results, indent=2) + '\n')

  session = Session(request)
  if request.video is not None:
    write('video', session.predict_video(request.video, request.start, output))
  if request.evaluate is not None:
    output.mkdir(parents=True, exist_ok=True)
    write('evaluation', session.evaluate(request.evaluate, request.max_clips))
  print(f'results: {path}')
  return results


class Session:
  """One model, one way of hiding, and what predictions are compared with.

  Attributes:
    request: What is asked for.
    world: The model.
    clip: How clips are cut.
    gallery: Clips to compare with, and to take statistics from.
    gallery_name: Where they are from.
    predictor: Predicts what is hidden.
    through: What a rollout feeds back.
    render: Draws features, None without a decoder.
    scorer: Scores predictions and baselines.
  """

  def __init__(self, request: Request):
    """Loads everything.

    Raises:
      ValueError: Something does not fit; one line says what.
    """
    self.request = request
    world = self.world = load_world_model(
      request.source,
      positions=request.positions,
      predictor_heads=request.predictor_heads,
    )
    self.clip = complete_clip(
      world,
      frames=request.frames,
      resolution=request.resolution,
      frame_step=request.frame_step,
      fps=request.fps,
    )
    side = self.clip.resolution
    grid = world.get_grid((1, self.clip.frames, side, side))
    masks = _choose_masks(request, grid, world.tubelet[0])
    loaded = load_decoder(request.decode, world) if request.decode else None
    if loaded and loaded.grid != grid:
      raise ValueError(
        f'{request.decode} decodes grids of {loaded.grid} tubelets, these '
        f'clips have {grid}: change --frames or --resolution'
      )
    self.gallery, self.gallery_name = self._load_gallery()
    self.predictor = MaskedPredictor(
      world,
      loaded.space if loaded else self._measure_space(),
      grid,
      masks,
      self._choose_token(),
    )
    self.through = request.roll_through or ('pixels' if loaded else 'features')
    if request.roll < 0:
      raise ValueError(f'--roll={request.roll} must not be negative')
    if request.roll:
      check_rollout(self.predictor, self.through, loaded is not None)
    self.render = make_render(self.predictor, loaded) if loaded else None
    self.scorer = Scorer(
      self.predictor,
      self.render,
      average=bool(loaded) or self._has_many_clips(),
    )

  def _has_many_clips(self) -> bool:
    """Says whether statistics of the gallery are of more than a few clips."""
    return len(self.gallery.videos) >= _FEWEST_CLIPS

  def _choose_token(self) -> int:
    token, count = self.request.mask_token, self.world.predictor.num_mask_tokens
    if token is None:
      return choose_mask_token(self.world, self.request.hide)
    if not 0 <= token < count:
      raise ValueError(
        f'--mask_token={token}: the predictor has {count} of them, counted '
        'from 0'
      )
    return token

  def _load_gallery(self) -> tuple[Clips, str]:
    """Reads clips to compare with: as told, of training, or what there is."""
    request = self.request
    trained = [source['path'] for source in self.world.sources]
    path = request.gallery or next(
      filter(glob.glob, trained), request.video or request.evaluate
    )
    try:
      if os.path.splitext(path)[1].lower() in sources.VIDEO_EXTENSIONS:
        return read_windows(path, self.clip, request.gallery_clips), path
    except decode.DecodeError as error:
      raise ValueError(f'{path}: {error}') from None
    source = sources.open_source(path)
    return load_clips(source, self.clip, limit=request.gallery_clips), path

  def _measure_space(self):
    """Measures the space of targets on the clips of the gallery."""
    videos, size = self.gallery.videos, self.request.batch_size
    if self.world.norm == 'position' and not self._has_many_clips():
      raise ValueError(
        f'targets of {self.request.source} are normalised over clips, and '
        f'{self.gallery_name} has {len(videos)}: give --gallery with '
        f'{_FEWEST_CLIPS} or more, or --decode, which knows the statistics'
      )
    space = measure_space(
      self.world, (videos[i : i + size] for i in range(0, len(videos), size))
    )
    if not self._has_many_clips():
      # Of so few, the mean at a position would be the very clip.
      mean = np.broadcast_to(space.average.mean(axis=0), space.average.shape)
      space = space._replace(average=mean)
    return space

  def _describe(self) -> dict[str, Any]:
    """Says what was asked for, for `results.json`."""
    predictor = self.predictor
    return {
      'source': str(self.request.source),
      'hide': self.request.hide,
      'frames': self.clip.frames,
      'resolution': self.clip.resolution,
      'frame_step': self.clip.frame_step,
      'fps': self.clip.fps,
      'visible_tokens': len(predictor.visible),
      'hidden_tokens': len(predictor.hidden),
      'mask_token': predictor.mask_token,
      'target_norm': predictor.space.norm,
      'gallery': self.gallery_name,
      'gallery_clips': len(self.gallery.videos),
      'decode': self.request.decode,
    }

  def _describe_hidden(self) -> str:
    """Says how many tubelets are hidden."""
    hidden, grid = self.predictor.hidden, self.predictor.grid
    return f'{len(hidden)} of {np.prod(grid)} tubelets'

  def predict_video(
    self, path: str, start: float, output: pathlib.Path
  ) -> dict[str, Any]:
    """Predicts a part of one clip, draws it, and prints its numbers."""
    windows = self.request.roll
    try:
      clip, rate = read_from(path, self.clip, start)
    except decode.DecodeError as error:
      raise ValueError(f'{path} from --start={start}: {error}') from None
    scores = join_scores([self.scorer.score(clip[None])])
    rolled = list(
      roll_out(self.predictor, clip[None], windows, self.through, self.render)
    )
    output.mkdir(parents=True, exist_ok=True)
    neighbours = self._draw(output, clip, rolled[0].prediction)
    if self.render is not None:
      self._film(output, path, start, rate, clip, rolled)
    print(
      f'{path}: {self.request.hide} of {self.clip.frames} frames hidden, '
      f'{self._describe_hidden()}\n{format_scores(scores)}\n'
      'actual frames come out at place '
      f'{", ".join(map(str, neighbours["ranks"]))} of '
      f'{neighbours["candidates"]} in {self.gallery_name}'
    )
    for name in sorted(p.name for p in output.glob('*.*')):
      if name != 'results.json':
        print(f'picture: {output / name}')
    return {
      **self._describe(),
      'video': str(path),
      'start': start,
      'scores': {
        name: {metric: value['mean'] for metric, value in values.items()}
        for name, values in scores.items()
      },
      'neighbours': neighbours,
      'rolled_windows': windows,
      'roll_through': self.through if windows else None,
    }

  def _draw(self, output, clip, prediction) -> dict[str, Any]:
    """Draws `prediction.png` and `neighbours.png`."""
    predictor, video = self.predictor, clip[None]
    predicted = np.asarray(prediction.predicted)
    truth = np.asarray(predictor.encode_hidden(video))
    scores = score_features(predicted, truth)
    actual = np.asarray(predictor.encode(video))
    tokens = join_tokens(prediction.visible, predicted, predictor.masks)
    centred = np.concatenate([actual, tokens]) - predictor.space.average
    colours = project_features(centred, predictor.grid)
    errors = np.full(actual.shape[1], np.nan)
    errors[predictor.hidden] = scores['error'][0]
    frames = {}
    if self.render is not None:
      for name, x in (('imagined', predicted), ('decoded truth', truth)):
        frames[name] = self.render(video, prediction.visible, x)[0]
    plots.draw_prediction(
      output / 'prediction.png',
      video=clip,
      errors=errors.reshape(predictor.grid),
      colours={'PCA actual': colours[0], 'PCA predicted': colours[1]},
      frames=frames,
      title=(
        f'{self.request.hide} hidden: cosine {scores["cosine"].mean():.3f}, '
        f'error {scores["error"].mean():.3f}'
      ),
    )
    retrieval = Retrieval(
      predictor, self.gallery.videos, self.request.batch_size
    )
    near, reference = (
      retrieval.find(x[0], truth[0], predictor.hidden, _NEIGHBOURS)
      for x in (predicted, truth)
    )
    shown = choose_steps(len(near.steps), 4)
    stride = self.world.tubelet[0]
    middle = near.steps[shown] * stride + stride // 2
    plots.draw_neighbours(
      output / 'neighbours.png',
      actual=clip[middle],
      names=[f'frame {i}' for i in middle],
      found={
        name: (found.frames[shown], found.similarities[shown])
        for name, found in (
          ('near the prediction', near),
          ('near the actual', reference),
        )
      },
    )
    return {
      'steps': near.steps.tolist(),
      'ranks': near.ranks.tolist(),
      'candidates': near.candidates,
    }

  def _film(self, output, path, start, rate, clip, rolled) -> None:
    """Writes input, prediction and truth as film and strip."""
    predictor, tubelet = self.predictor, self.world.tubelet
    visible, hidden = predictor.masks
    tokens = np.array(patchify(clip[None], tubelet))
    tokens[:, hidden] = 128
    film = [window.render(self.render)[0] for window in rolled]
    context = count_frames(predictor, visible)
    imagined = np.concatenate([film[0], *(x[context:] for x in film[1:])])
    truth = self._read_truth(path, start, len(imagined), clip)
    clips = {
      'input': unpatchify(tokens, predictor.grid, tubelet)[0],
      'imagined': imagined,
      'truth': truth,
    }
    plots.write_side_by_side(output / 'imagined', clips, rate)
    still = fill_pixels(clip[None], visible, hidden, tubelet, 'last')
    plots.draw_strip(
      output / 'imagined.png',
      {'truth': truth, **clips, 'last frame': still[0]},
    )

  def _read_truth(self, path, start, length, clip) -> np.ndarray:
    """Reads what came after the clip, as far as the video goes."""
    for frames in range(length, len(clip), -self.world.tubelet[0]):
      options = dataclasses.replace(self.clip, frames=frames)
      with contextlib.suppress(decode.DecodeError):
        return read_from(path, options, start)[0]
    return clip

  def evaluate(self, path: str, limit: int | None) -> dict[str, Any]:
    """Averages over held-out clips, and prints a table."""
    predictor, windows = self.predictor, self.request.roll
    stride = count_frames(predictor, predictor.hidden)
    options = dataclasses.replace(
      self.clip, frames=self.clip.frames + windows * stride
    )
    clips = load_clips(
      sources.open_source(path), options, limit=limit, whole=windows > 0
    )
    scores, rolled = self.scorer.score_all(
      clips.videos, self.request.batch_size, windows, self.through
    )
    results = {
      **self._describe(),
      'evaluate': path,
      'clips': len(clips.videos),
      'left_out': list(clips.failures),
      'scores': scores,
    }
    print(
      f'\n{results["clips"]} clips of {path}: {self.request.hide} hidden, '
      f'{self._describe_hidden()}; mean and standard error over clips\n'
      + format_scores(scores)
    )
    if windows:
      print(f'\nrolling on, {stride} frames a window, through {self.through}:')
      results['roll_through'] = self.through
      results['rolling'] = rolled
      for k, window in enumerate(rolled):
        print(f'window {k}\n{format_scores(window)}')
    if clips.failures:
      print(f'{len(clips.failures)} videos could not be used, see results.json')
    return results


def _choose_masks(
  request: Request, grid: tuple[int, int, int], tubelet_frames: int
) -> tuple[np.ndarray, np.ndarray]:
  """Chooses the visible and the hidden tokens."""
  frames = request.context_frames
  if frames is None:
    steps = 0 if request.hide == 'region' else max(1, grid[0] // 2)
  else:
    steps, rest = divmod(frames, tubelet_frames)
    if rest or frames < 0:
      raise ValueError(
        f'--context_frames={frames} is not a multiple of the '
        f'{tubelet_frames} frames of a tubelet'
      )
  try:
    top, left, height, width = map(float, request.box)
  except ValueError:
    raise ValueError(
      f'--box={",".join(map(str, request.box))} is not top,left,height,width '
      'in shares of the frame, for example 0.25,0.25,0.5,0.5'
    ) from None
  return choose_hidden(grid, request.hide, steps, (top, left, height, width))
