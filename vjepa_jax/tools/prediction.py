"""What `vjepa_jax.tools.predict` does: a clip in pictures, clips in numbers."""

import contextlib
import dataclasses
import os
from types import SimpleNamespace
from typing import Any

from etils import epath
import numpy as np

from vjepa_jax.data import decode, sources, storage
from vjepa_jax.data.clip import Clips, load_clips, read_from, read_windows
from vjepa_jax.errors import UserError
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.models.tubelets import patchify, unpatchify
from vjepa_jax.plots import prediction as plots
from vjepa_jax.plots.figures import choose_steps
from vjepa_jax.plots.training import project_features
from vjepa_jax.world.baselines import fill_pixels
from vjepa_jax.world.decoding import load_decoder
from vjepa_jax.world.masks import Masks, choose_hidden
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


class Session:
  """One model, one way of hiding, and real clips to compare with."""

  def __init__(self, options: SimpleNamespace, source: str):
    """Loads everything that the flags of `vjepa_jax.tools.predict` name."""
    self.options, self.source = options, source
    world = load_world_model(
      source,
      positions=options.positions,
      predictor_positions=options.predictor_positions,
      predictor_heads=options.predictor_heads,
    )
    self.clip = complete_clip(
      world,
      frames=options.frames,
      resolution=options.resolution,
      frame_step=options.frame_step,
      fps=options.fps,
    )
    side = self.clip.resolution
    # Of one frame they are images.
    self.world = world = world._replace(frames=self.clip.frames)
    grid = world.get_grid((1, self.clip.frames, side, side))
    masks = _choose_masks(options, grid, world.tubelet[0])
    loaded = load_decoder(options.decode, world) if options.decode else None
    if loaded and loaded.grid != grid:
      raise UserError(
        f'{options.decode} decodes grids of {loaded.grid} tubelets, these '
        f'clips have {grid}: change --frames or --resolution'
      )
    self.clips, self.clips_path = self._load_clips()
    many = len(self.clips.videos) >= _FEWEST_CLIPS
    space = loaded.space if loaded else self._measure_space(many)
    token = self._choose_token()
    self.predictor = MaskedPredictor(world, space, grid, masks, token)
    self.share = f'{len(masks[1])} of {np.prod(grid)} tubelets'
    self.through = options.roll_through or ('pixels' if loaded else 'features')
    if options.roll:
      check_rollout(self.predictor, self.through, loaded is not None)
    self.render = make_render(self.predictor, loaded) if loaded else None
    average = bool(loaded) or many
    self.scorer = Scorer(self.predictor, self.render, average=average)

  def _choose_token(self) -> int:
    token, count = self.options.mask_token, self.world.predictor.num_mask_tokens
    if token is None:
      return choose_mask_token(self.world, self.options.hide)
    if not 0 <= token < count:
      raise UserError(
        f'--mask_token={token}: the predictor has {count} of them, counted '
        'from 0'
      )
    return token

  def _load_clips(self) -> tuple[Clips, str]:
    """Reads clips to compare with: as told, of training, or what there is."""
    options = self.options
    trained = [source['path'] for source in self.world.sources]
    path = options.gallery or next(
      filter(storage.match, trained), options.video or options.evaluate
    )
    if os.path.splitext(path)[1].lower() in sources.VIDEO_EXTENSIONS:
      try:
        return read_windows(path, self.clip, options.gallery_clips), path
      except decode.DecodeError as error:
        raise UserError(f'{path}: {error}') from None
    source = sources.open_source(path)
    return load_clips(source, self.clip, limit=options.gallery_clips), path

  def _measure_space(self, many: bool):
    """Measures the space of targets on the clips, which are `many` or few."""
    videos, size = self.clips.videos, self.options.batch_size
    if self.world.norm == 'position' and not many:
      raise UserError(
        f'targets of {self.source} are normalised over clips, and '
        f'{self.clips_path} has {len(videos)}: give --gallery with '
        f'{_FEWEST_CLIPS} or more, or --decode, which knows the statistics'
      )
    space = measure_space(
      self.world, (videos[i : i + size] for i in range(0, len(videos), size))
    )
    if not many:
      # Of so few, the mean at a position would be the very clip.
      mean = np.broadcast_to(space.average.mean(axis=0), space.average.shape)
      space = space._replace(average=mean)
    return space

  def _describe(self) -> dict[str, Any]:
    """Says what was asked for, for `results.json`."""
    predictor, clip = self.predictor, dataclasses.asdict(self.clip)
    return {
      'source': self.source,
      'hide': self.options.hide,
      **{k: clip[k] for k in ('frames', 'resolution', 'frame_step', 'fps')},
      'visible_tokens': len(predictor.visible),
      'hidden_tokens': len(predictor.hidden),
      'mask_token': predictor.mask_token,
      'target_norm': predictor.space.norm,
      'gallery': self.clips_path,
      'gallery_clips': len(self.clips.videos),
      'decode': self.options.decode,
    }

  def predict_video(self, output: epath.Path) -> dict[str, Any]:
    """Predicts a part of one clip, draws it, and prints its numbers."""
    path, start = self.options.video, self.options.start
    windows = self.options.roll
    try:
      clip, rate = read_from(path, self.clip, start)
    except decode.DecodeError as error:
      raise UserError(f'{path} from --start={start}: {error}') from None
    scores = join_scores([self.scorer.score(clip[None])])
    rollout = list(
      roll_out(self.predictor, clip[None], windows, self.through, self.render)
    )
    prediction = rollout[0].prediction
    with storage.writing_folder(output) as folder:
      storage.make_folder(folder)
      self._draw_prediction(folder / 'prediction.png', clip, prediction)
      neighbours = self._find_neighbours(folder, clip, prediction)
      if self.render is not None:
        self._film(folder, rate, clip, rollout)
    print(
      f'{path}: {self.options.hide} of {self.clip.frames} frames hidden, '
      f'{self.share}\n{format_scores(scores)}\n'
      'actual frames come out at place '
      f'{", ".join(map(str, neighbours["ranks"]))} of '
      f'{neighbours["candidates"]} in {self.clips_path}'
    )
    for name in sorted(p.name for p in output.glob('*.*')):
      if name != 'results.json':
        print(f'picture: {output / name}')
    return {
      **self._describe(),
      'video': path,
      'start': start,
      'scores': {
        name: {metric: value['mean'] for metric, value in values.items()}
        for name, values in scores.items()
      },
      'neighbours': neighbours,
      'rolled_windows': windows,
      'roll_through': self.through if windows else None,
    }

  def _draw_prediction(self, path, clip, prediction) -> None:
    """Draws errors and features over frames."""
    predictor, video = self.predictor, clip[None]
    predicted, truth = prediction.predicted, predictor.encode_hidden(video)
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
      path,
      video=clip,
      errors=errors.reshape(predictor.grid),
      colours={'PCA actual': colours[0], 'PCA predicted': colours[1]},
      frames=frames,
      title=(
        f'{self.options.hide} hidden: cosine {scores["cosine"].mean():.3f}, '
        f'error {scores["error"].mean():.3f}'
      ),
    )

  def _find_neighbours(self, output, clip, prediction) -> dict[str, Any]:
    """Finds and draws the nearest real frames."""
    predictor, size = self.predictor, self.options.batch_size
    retrieval = Retrieval(predictor, self.clips.videos, size)
    truth = np.asarray(predictor.encode_hidden(clip[None]))[0]
    near, reference = (
      retrieval.find(x, truth, predictor.hidden, _NEIGHBOURS)
      for x in (np.asarray(prediction.predicted)[0], truth)
    )
    shown = choose_steps(len(near.steps), 4)
    stride = self.world.tubelet[0]
    middle = near.steps[shown] * stride + stride // 2
    found = {'near the prediction': near, 'near the actual': reference}
    plots.draw_neighbours(
      output / 'neighbours.png',
      actual=clip[middle],
      names=[f'frame {i}' for i in middle],
      found={
        name: (x.frames[shown], x.similarities[shown])
        for name, x in found.items()
      },
    )
    return {
      'steps': near.steps.tolist(),
      'ranks': near.ranks.tolist(),
      'candidates': near.candidates,
    }

  def _film(self, output, rate, clip, rollout) -> None:
    """Writes input, prediction and truth as film and strip."""
    predictor, tubelet = self.predictor, self.world.tubelet
    visible, hidden = predictor.masks
    tokens = np.array(patchify(clip[None], tubelet))
    tokens[:, hidden] = 128
    film = [window.render(self.render)[0] for window in rollout]
    context = count_frames(predictor, visible)
    imagined = np.concatenate([film[0], *(x[context:] for x in film[1:])])
    clips = {
      'input': unpatchify(tokens, predictor.grid, tubelet)[0],
      'imagined': imagined,
      'truth': self._read_truth(len(imagined), clip),
    }
    plots.write_side_by_side(output / 'imagined', clips, rate)
    still = fill_pixels(clip[None], predictor.masks, tubelet, 'last')
    plots.draw_strip(
      output / 'imagined.png',
      {'truth': clips['truth'], **clips, 'last frame': still[0]},
    )

  def _read_truth(self, length: int, clip: np.ndarray) -> np.ndarray:
    """Reads what came after the clip, as far as the video goes."""
    for frames in range(length, len(clip), -self.world.tubelet[0]):
      cut = dataclasses.replace(self.clip, frames=frames)
      with contextlib.suppress(decode.DecodeError):
        return read_from(self.options.video, cut, self.options.start)[0]
    return clip

  def evaluate(self) -> dict[str, Any]:
    """Averages over held-out clips, and prints a table."""
    path, windows = self.options.evaluate, self.options.roll
    stride = count_frames(self.predictor, self.predictor.hidden)
    frames = self.clip.frames + windows * stride
    clips = load_clips(
      sources.open_source(path),
      dataclasses.replace(self.clip, frames=frames),
      limit=self.options.max_clips,
      whole=windows > 0,
    )
    scores, rollout = self.scorer.score_all(
      clips.videos, self.options.batch_size, windows, self.through
    )
    results = {
      **self._describe(),
      'evaluate': path,
      'clips': len(clips.videos),
      'left_out': list(clips.failures),
      'scores': scores,
    }
    print(
      f'\n{results["clips"]} clips of {path}: {self.options.hide} hidden, '
      f'{self.share}; mean and standard error over clips\n'
      + format_scores(scores)
    )
    if windows:
      print(f'\nrolling on, {stride} frames a window, through {self.through}:')
      results |= {'roll_through': self.through, 'rolling': rollout}
      for k, window in enumerate(rollout):
        print(f'window {k}\n{format_scores(window)}')
    if clips.failures:
      print(f'{len(clips.failures)} videos could not be used, see results.json')
    return results


def _choose_masks(
  options: SimpleNamespace, grid: tuple[int, int, int], tubelet_frames: int
) -> Masks:
  """Chooses the visible and the hidden tokens."""
  steps = 0 if options.hide == 'region' else max(1, grid[0] // 2)
  if options.context_frames is not None:
    steps, rest = divmod(options.context_frames, tubelet_frames)
    if rest:
      raise UserError(
        f'--context_frames={options.context_frames} is not a multiple of the '
        f'{tubelet_frames} frames of a tubelet'
      )
  try:
    top, left, height, width = map(float, options.box)
  except ValueError:
    raise UserError(
      f'--box={",".join(options.box)} is not top,left,height,width in shares '
      'of the frame, for example 0.25,0.25,0.5,0.5'
    ) from None
  return choose_hidden(grid, options.hide, steps, (top, left, height, width))
