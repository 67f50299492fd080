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

import dataclasses
import sys

from absl import app, flags, logging

from vjepa_jax import mistakes
from vjepa_jax.world.masks import HIDDEN

flags.DEFINE_string('video', None, 'Video to predict a part of.')
flags.DEFINE_string(
  'evaluate',
  None,
  'Held-out videos to average over: a manifest, folder, glob or shards.',
)
flags.DEFINE_string('output', None, 'Folder; WORKDIR/predict if none.')
flags.DEFINE_enum('hide', 'future', HIDDEN, 'What is hidden.')
flags.DEFINE_integer(
  'context_frames',
  None,
  'Frames that are visible; half the clip if none, and 0 for a region, which '
  'is hidden after them.',
)
flags.DEFINE_list(
  'box',
  ['0.25', '0.25', '0.5', '0.5'],
  'Of a region: top, left, height, width, in shares of the frame.',
)
flags.DEFINE_float('start', 0.0, 'Where the clip begins, seconds.')
flags.DEFINE_string(
  'gallery',
  None,
  'Videos to find nearest frames in, and to take statistics of features from; '
  'those of training if none, or else the video itself.',
)
flags.DEFINE_integer('gallery_clips', 256, 'At most so many.')
flags.DEFINE_string(
  'decode', None, 'Workdir of configs/decoder.py: imagine pixels.'
)
flags.DEFINE_integer('roll', 0, 'Windows to go on for, from what was imagined.')
flags.DEFINE_enum(
  'roll_through',
  None,
  ['pixels', 'features'],
  'What is fed back; pixels with --decode, features without.',
)
flags.DEFINE_integer('max_clips', None, 'Of --evaluate, at most.')
flags.DEFINE_integer('batch_size', 16, 'Clips at a time.')
flags.DEFINE_integer('frames', None, 'Frames of a clip.')
flags.DEFINE_integer('resolution', None, 'Its height and width.')
flags.DEFINE_integer(
  'frame_step', None, 'Video frames from one frame of a clip to the next.'
)
flags.DEFINE_float('fps', None, 'Or clip frames a second.')
flags.DEFINE_integer(
  'mask_token',
  None,
  'Mask token of the predictor; if none, the one that was trained for what is '
  'hidden.',
)
flags.DEFINE_string(
  'positions', None, 'Of an official file: sincos or rope_tiled.'
)
flags.DEFINE_integer(
  'predictor_heads', None, "Of an official file's predictor."
)


def main(argv: list[str]) -> None:
  """Predicts as the flags say."""
  # Imported late: --help and wrong flags answer at once.
  from vjepa_jax.tools import prediction

  if len(argv) != 2:
    raise ValueError(
      'give one workdir, Hugging Face folder or official file, got '
      f'{", ".join(argv[1:]) or "none"}'
    )
  # Orbax tells its life at the level of information.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= logging.logging.WARNING
      or 'vjepa_jax' in record.pathname
    )
  )
  names = [field.name for field in dataclasses.fields(prediction.Request)]
  values = flags.FLAGS.flag_values_dict()
  prediction.run(
    prediction.Request(
      **{'source': argv[1]} | {n: values[n] for n in names if n != 'source'}
    )
  )


if __name__ == '__main__':
  try:
    app.run(main, flags_parser=mistakes.parse_flags)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(mistakes.explain(error))
