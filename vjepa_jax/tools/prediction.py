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
from vjepa_jax.plots import prediction as draw
from vjepa_jax.plots.training import project_features
from vjepa_jax.progress import make_bar
from vjepa_jax.world import baselines as guesses
from vjepa_jax.world import predict as imagination
from vjepa_jax.world.decoding import LoadedDecoder, load_decoder
from vjepa_jax.world.masks import choose_hidden
from vjepa_jax.world.model import complete_clip, measure_space
from vjepa_jax.world.retrieval import Gallery
from vjepa_jax.world.rollout import (
  check_rolling,
  join_tokens,
  make_render,
  roll,
)

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


def _parse_box(values: Sequence[float | str]) -> tuple[float, ...]:
  try:
    top, left, height, width = map(float, values)
  except ValueError:
    raise ValueError(
      f'--box={",".join(map(str, values))} is not top,left,height,width in '
      'shares of the frame, for example 0.25,0.25,0.5,0.5'
    ) from None
  return top, left, height, width


class Session:
  """One model, one way of hiding, and what predictions are compared with."""

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
    self.grid = world.get_grid((1, self.clip.frames, side, side))
    masks = self._choose_masks()
    loaded = None
    if request.decode:
      loaded = load_decoder(request.decode, world)
      if loaded.grid != self.grid:
        raise ValueError(
          f'{request.decode} decodes grids of {loaded.grid} tubelets, these '
          f'clips have {self.grid}: change --frames or --resolution'
        )
    self.through = request.roll_through or ('pixels' if loaded else 'features')
    self.gallery_clips, self.gallery_name = self._load_gallery()
    space = loaded.space if loaded else self._measure()
    token = request.mask_token
    if token is None:
      token = imagination.choose_mask_token(world, request.hide)
    elif not 0 <= token < world.predictor.num_mask_tokens:
      raise ValueError(
        f'--mask_token={token}: the predictor has '
        f'{world.predictor.num_mask_tokens} of them, counted from 0'
      )
    self.future = imagination.Imagination(world, space, self.grid, masks, token)
    if request.roll < 0:
      raise ValueError(f'--roll={request.roll} must not be negative')
    if request.roll:
      check_rolling(self.future, self.through, loaded is not None)
    self.loaded: LoadedDecoder | None = loaded
    self.render = make_render(self.future, loaded) if loaded else None
    self.scorer = guesses.Scorer(
      self.future,
      loaded,
      average=loaded is not None or self._has_many_clips(),
    )

  def _has_many_clips(self) -> bool:
    """Says whether statistics of the gallery are of more than a few clips."""
    return len(self.gallery_clips.videos) >= _FEWEST_CLIPS

  def _choose_masks(self) -> tuple[np.ndarray, np.ndarray]:
    request, size = self.request, self.world.tubelet[0]
    frames = request.context_frames
    if frames is None:
      steps = 0 if request.hide == 'region' else max(1, self.grid[0] // 2)
    else:
      steps, rest = divmod(frames, size)
      if rest or frames < 0:
        raise ValueError(
          f'--context_frames={frames} is not a multiple of the {size} frames '
          'of a tubelet'
        )
    return choose_hidden(
      self.grid, request.hide, steps, _parse_box(request.box)
    )

  def _load_gallery(self) -> tuple[Clips, str]:
    """Reads clips to compare with: as told, of training, or what there is."""
    paths = [self.request.gallery] if self.request.gallery else []
    if not paths:
      known = [source['path'] for source in self.world.sources]
      paths = [p for p in known if glob.glob(p)] or [
        self.request.video or self.request.evaluate
      ]
    limit = self.request.gallery_clips
    path = paths[0]
    single = os.path.splitext(path)[1].lower() in sources.VIDEO_EXTENSIONS
    try:
      if single:
        return read_windows(path, self.clip, limit), path
    except decode.DecodeError as error:
      raise ValueError(f'{path}: {error}') from None
    return load_clips(sources.open_source(path), self.clip, limit=limit), path

  def _measure(self):
    """Measures the space of targets on the clips of the gallery."""
    videos, size = self.gallery_clips.videos, self.request.batch_size
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
    future = self.future
    return {
      'source': str(self.request.source),
      'hide': self.request.hide,
      'frames': self.clip.frames,
      'resolution': self.clip.resolution,
      'frame_step': self.clip.frame_step,
      'fps': self.clip.fps,
      'visible_tokens': len(future.visible),
      'hidden_tokens': len(future.hidden),
      'mask_token': future.mask_token,
      'target_norm': future.space.norm,
      'gallery': self.gallery_name,
      'gallery_clips': len(self.gallery_clips.videos),
      'decode': self.request.decode,
    }

  def predict_video(
    self, path: str, start: float, output: pathlib.Path
  ) -> dict[str, Any]:
    """Predicts a part of one clip, draws it, and prints its numbers."""
    windows = self.request.roll
    try:
      clip, rate = read_from(path, self.clip, start)
    except decode.DecodeError as error:
      raise ValueError(f'{path} from --start={start}: {error}') from None
    video = clip[None]
    scores = guesses.summarize_scores(self.scorer(video))
    scores = {
      name: {metric: value['mean'] for metric, value in values.items()}
      for name, values in scores.items()
    }
    rolled = list(roll(self.future, video, windows, self.through, self.render))
    output.mkdir(parents=True, exist_ok=True)
    neighbours = self._draw(output, clip, rolled[0].imagined)
    if self.render is not None:
      self._film(output, path, start, rate, clip, rolled)
    print(
      f'{path}: {self.request.hide} of {self.clip.frames} frames hidden, '
      f'{len(self.future.hidden)} of {np.prod(self.grid)} tubelets'
    )
    print(_format_single(scores))
    print(
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
      'scores': scores,
      'neighbours': neighbours,
      'rolled_windows': windows,
      'roll_through': self.through if windows else None,
    }

  def _draw(self, output, clip, imagined) -> dict[str, Any]:
    """Draws `prediction.png` and `neighbours.png`."""
    future, world = self.future, self.world
    masks = future.visible, future.hidden
    actual = np.asarray(future.encode(clip[None]))
    predicted = np.asarray(imagined.predicted)
    tokens = np.asarray(join_tokens(imagined.seen, predicted, *masks))
    truth = np.asarray(future.reveal(clip[None]))
    scores = imagination.score_features(predicted, truth)
    errors = np.full(actual.shape[1], np.nan)
    errors[future.hidden] = scores['error'][0]
    centred = np.concatenate([actual, tokens]) - future.space.average
    colours = project_features(centred, self.grid)
    frames = {}
    if self.render is not None:
      args = clip[None], imagined.seen
      frames['imagined'] = self.render(*args, predicted)[0]
      frames['decoded truth'] = self.render(*args, truth)[0]
    draw.draw_prediction(
      output / 'prediction.png',
      video=clip,
      errors=errors.reshape(self.grid),
      colours={'PCA actual': colours[0], 'PCA predicted': colours[1]},
      frames=frames,
      title=(
        f'{self.request.hide} hidden: cosine {scores["cosine"].mean():.3f}, '
        f'error {scores["error"].mean():.3f}'
      ),
    )
    gallery = Gallery(future, self.gallery_clips, self.request.batch_size)
    arguments = truth[0], future.hidden, _NEIGHBOURS
    near = gallery.find(predicted[0], *arguments)
    reference = gallery.find(truth[0], *arguments)
    shown = draw.choose_steps(len(near.steps), 4)
    stride = world.tubelet[0]
    draw.draw_neighbours(
      output / 'neighbours.png',
      actual=clip[near.steps[shown] * stride + stride // 2],
      names=[f'frame {s * stride + stride // 2}' for s in near.steps[shown]],
      found={
        'near the prediction': (near.frames[shown], near.similarities[shown]),
        'near the actual': (
          reference.frames[shown],
          reference.similarities[shown],
        ),
      },
    )
    return {
      'steps': near.steps.tolist(),
      'ranks': near.ranks.tolist(),
      'candidates': near.candidates,
    }

  def _film(self, output, path, start, rate, clip, rolled) -> None:
    """Writes input, imagination and truth as film and strip."""
    masks = self.future.visible, self.future.hidden
    tubelet = self.world.tubelet
    grey = np.full_like(clip, 128)
    given = imagination.fill_pixels(clip[None], *masks, tubelet, 'last')
    shown = join_tokens(
      *(
        patchify(x[None], tubelet)[:, ids]
        for x, ids in zip((clip, grey), masks, strict=True)
      ),
      *masks,
    )
    shown = unpatchify(shown, self.grid, tubelet)[0]
    film = [
      np.asarray(self.render(w.clip, w.imagined.seen, w.imagined.predicted))[0]
      for w in rolled
    ]
    context = len(masks[0]) // (self.grid[1] * self.grid[2]) * tubelet[0]
    imagined = np.concatenate([film[0], *(x[context:] for x in film[1:])])
    truth = self._read_truth(path, start, len(imagined), clip)
    clips = {'input': np.asarray(shown), 'imagined': imagined, 'truth': truth}
    draw.write_side_by_side(output / 'imagined', clips, rate)
    draw.draw_strip(
      output / 'imagined.png',
      {'truth': truth, **clips, 'last frame': given[0]},
    )

  def _read_truth(self, path, start, length, clip) -> np.ndarray:
    """Reads what came after the clip, as far as the video goes."""
    if length == len(clip):
      return clip
    step = self.world.tubelet[0]
    for frames in range(length, len(clip), -step):
      options = dataclasses.replace(self.clip, frames=frames)
      with contextlib.suppress(decode.DecodeError):
        return read_from(path, options, start)[0]
    return clip

  def evaluate(self, path: str, limit: int | None) -> dict[str, Any]:
    """Averages over held-out clips, and prints a table."""
    windows, size = self.request.roll, self.request.batch_size
    hidden_steps = len(self.future.hidden) // (self.grid[1] * self.grid[2])
    stride = hidden_steps * self.world.tubelet[0]
    options = dataclasses.replace(
      self.clip, frames=self.clip.frames + windows * stride
    )
    clips = load_clips(
      sources.open_source(path), options, limit=limit, whole=windows > 0
    )
    count = len(clips.videos)
    parts, rolled = [], []
    for i in make_bar(
      range(0, count, size), desc='predicting', unit='batch', leave=False
    ):
      video = clips.videos[i : i + size]
      real = len(video)
      # One shape, one program.
      rows = [(0, size - real)] + [(0, 0)] * 4
      video = np.pad(video, rows, mode='edge') if count > size else video
      parts.append(_cut(self.scorer(video[:, : self.clip.frames]), real))
      if windows:
        scores = guesses.score_rolling(
          self.future,
          video,
          self.clip.frames,
          windows,
          self.through,
          self.render,
        )
        rolled.append([_cut(window, real) for window in scores])
    summary = guesses.summarize_scores(guesses.join_scores(parts))
    print(
      f'\n{count} clips of {path}: {self.request.hide} hidden, '
      f'{len(self.future.hidden)} of {np.prod(self.grid)} tubelets; mean and '
      'standard error over clips'
    )
    print(guesses.format_scores(summary))
    results = {
      **self._describe(),
      'evaluate': path,
      'clips': count,
      'left_out': list(clips.failures),
      'scores': summary,
    }
    if windows:
      print(f'\nrolling on, {stride} frames a window, through {self.through}:')
      results['roll_through'] = self.through
      results['rolling'] = [
        guesses.summarize_scores(guesses.join_scores(list(parts)))
        for parts in zip(*rolled, strict=True)
      ]
      for k, window in enumerate(results['rolling']):
        print(f'window {k}\n{guesses.format_scores(window)}')
    if clips.failures:
      print(f'{len(clips.failures)} videos could not be used, see results.json')
    return results


def _cut(scores: guesses.Scores, count: int) -> guesses.Scores:
  """Keeps the scores of the first `count` clips."""
  return {
    name: {metric: x[:count] for metric, x in values.items()}
    for name, values in scores.items()
  }


def _format_single(scores: dict[str, dict[str, float]]) -> str:
  """Formats the scores of one clip."""
  metrics = {'cosine': 'cosine', 'error': 'error', 'psnr': 'PSNR, dB'}
  lines = [' ' * 26 + ''.join(f'{m:>11}' for m in metrics.values())]
  for name, title in guesses.TITLES.items():
    if name in scores:
      cells = [scores[name].get(m) for m in metrics]
      lines.append(
        title.ljust(26)
        + ''.join(' ' * 11 if x is None else f'{x:11.3f}' for x in cells)
      )
  return '\n'.join(lines)
