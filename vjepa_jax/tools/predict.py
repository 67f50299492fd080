"""Hides a part of a clip, predicts its features, and draws what was imagined.

python -m vjepa_jax.tools.predict runs/quickstart --video=clip.mp4
python -m vjepa_jax.tools.predict runs/quickstart --video=clip.mp4 \
  --decode=runs/decoder --roll=2
python -m vjepa_jax.tools.predict runs/quickstart --decode=runs/decoder \
  --evaluate=data/motion/test.csv

Takes a workdir of pretraining, a Hugging Face folder or an official file, with
a predictor. Writes to WORKDIR/predict: `prediction.png` (errors over frames,
features as colours), `neighbours.png` (nearest real frames) and, with --decode,
`imagined.png`, `.gif` and `.mp4`; numbers and baselines go to `results.json`.
docs/prediction.md says what they mean.
"""

import json
import pathlib
import sys

from absl import app, flags, logging

from vjepa_jax import mistakes
from vjepa_jax.masks.chosen import HIDDEN

_VIDEO = flags.DEFINE_string('video', None, 'Video to predict a part of.')
_EVALUATE = flags.DEFINE_string(
  'evaluate',
  None,
  'Held-out videos to average over: a manifest, folder, glob or shards.',
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Folder; WORKDIR/predict if none.'
)
_HIDE = flags.DEFINE_enum('hide', 'future', HIDDEN, 'What is hidden.')
_CONTEXT = flags.DEFINE_integer(
  'context_frames',
  None,
  'Frames that are visible; half the clip if none, and 0 for a region, which '
  'is hidden after them.',
)
_BOX = flags.DEFINE_list(
  'box',
  ['0.25', '0.25', '0.5', '0.5'],
  'Of a region: top, left, height, width, in shares of the frame.',
)
_START = flags.DEFINE_float('start', 0.0, 'Where the clip begins, seconds.')
_GALLERY = flags.DEFINE_string(
  'gallery',
  None,
  'Videos to find nearest frames in, and to take statistics of features from; '
  'those of training if none, or else the video itself.',
)
_GALLERY_CLIPS = flags.DEFINE_integer('gallery_clips', 256, 'At most so many.')
_DECODE = flags.DEFINE_string(
  'decode', None, 'Workdir of configs/decoder.py: imagine pixels.'
)
_ROLL = flags.DEFINE_integer(
  'roll', 0, 'Windows to go on for, from what was imagined.'
)
_THROUGH = flags.DEFINE_enum(
  'roll_through',
  None,
  ['pixels', 'features'],
  'What is fed back; pixels with --decode, features without.',
)
_MAX_CLIPS = flags.DEFINE_integer('max_clips', None, 'Of --evaluate, at most.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Clips at a time.')
_FRAMES = flags.DEFINE_integer('frames', None, 'Frames of a clip.')
_RESOLUTION = flags.DEFINE_integer('resolution', None, 'Its height and width.')
_FRAME_STEP = flags.DEFINE_integer(
  'frame_step', None, 'Video frames from one frame of a clip to the next.'
)
_FPS = flags.DEFINE_float('fps', None, 'Or clip frames a second.')
_MASK_TOKEN = flags.DEFINE_integer(
  'mask_token',
  None,
  'Mask token of the predictor; if none, the one that was trained for what is '
  'hidden.',
)
_POSITIONS = flags.DEFINE_string(
  'positions', None, 'Of an official file: sincos or rope_tiled.'
)
_PREDICTOR_HEADS = flags.DEFINE_integer(
  'predictor_heads', None, "Of an official file's predictor."
)


def main(argv: list[str]) -> None:
  """Predicts as the flags say."""
  # Imported late: --help and wrong flags answer at once.
  from vjepa_jax.tools import prediction

  if len(argv) != 2:
    raise ValueError(
      'give one workdir, Hugging Face folder or official file, got '
      f'{argv[1:] or "none"}'
    )
  if _VIDEO.value is None and _EVALUATE.value is None:
    raise ValueError('give --video=FILE, --evaluate=MANIFEST or both')
  # Orbax tells its life at the level of information.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= logging.logging.WARNING
      or 'vjepa_jax' in record.pathname
    )
  )
  source = argv[1]
  output = _OUTPUT.value
  if output is None:
    folder = pathlib.Path(source)
    output = folder / 'predict' if folder.is_dir() else 'predict'
  session = prediction.Session(
    source,
    prediction.Request(
      hide=_HIDE.value,
      context_frames=_CONTEXT.value,
      box=_parse_box(_BOX.value),
      frames=_FRAMES.value,
      resolution=_RESOLUTION.value,
      frame_step=_FRAME_STEP.value,
      fps=_FPS.value,
      mask_token=_MASK_TOKEN.value,
      decode=_DECODE.value,
      roll=_ROLL.value,
      through=_THROUGH.value,
      gallery=_GALLERY.value,
      gallery_clips=_GALLERY_CLIPS.value,
      batch_size=_BATCH_SIZE.value,
    ),
    fallback=_VIDEO.value or _EVALUATE.value,
    positions=_POSITIONS.value,
    predictor_heads=_PREDICTOR_HEADS.value,
  )
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  if _VIDEO.value is not None:
    results = session.predict_video(_VIDEO.value, _START.value, output)
    _write(output, 'video', results)
  if _EVALUATE.value is not None:
    results = session.evaluate(_EVALUATE.value, _MAX_CLIPS.value)
    _write(output, 'evaluation', results)
  print(f'results: {output / "results.json"}')


def _parse_box(values: list[str]) -> tuple[float, ...]:
  try:
    top, left, height, width = map(float, values)
  except ValueError:
    raise ValueError(
      f'--box={",".join(values)} is not top,left,height,width in shares of the '
      'frame, for example 0.25,0.25,0.5,0.5'
    ) from None
  return top, left, height, width


def _write(output: pathlib.Path, section: str, results: dict) -> None:
  """Writes a section of `results.json`, and keeps the other."""
  path = output / 'results.json'
  known = json.loads(path.read_text()) if path.exists() else {}
  known[section] = results
  path.write_text(json.dumps(known, indent=2) + '\n')


if __name__ == '__main__':
  try:
    app.run(main, flags_parser=mistakes.parse_flags)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(mistakes.explain(error))
