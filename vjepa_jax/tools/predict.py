r"""Hides a part of a clip, predicts its features, and draws what was imagined.

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

from types import SimpleNamespace

from vjepa_jax.tools import command
from vjepa_jax.world.masks import HIDDEN


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('video', None, 'Video to predict a part of.')
  define.string(
    'evaluate',
    None,
    'Held-out videos to average over: a manifest, folder, glob or shards.',
  )
  define.string('output', None, 'Folder; WORKDIR/predict if none.')
  define.enum('hide', 'future', HIDDEN, 'What is hidden.')
  define.integer(
    'context_frames',
    None,
    'Frames that are visible; half the clip if none, and 0 for a region, which '
    'is hidden after them.',
  )
  define.list(
    'box',
    ['0.25', '0.25', '0.5', '0.5'],
    'Of a region: top, left, height, width, in shares of the frame.',
  )
  define.float('start', 0.0, 'Where the clip begins, seconds.')
  define.string(
    'gallery',
    None,
    'Videos to find nearest frames in, and to take statistics of features '
    'from; those of training if none, or else the video itself.',
  )
  define.integer('gallery_clips', 256, 'At most so many.')
  define.string(
    'decode', None, 'Workdir of configs/decoder.py: imagine pixels.'
  )
  define.integer(
    'roll', 0, 'Windows to go on for, from what was imagined.', lower_bound=0
  )
  define.enum(
    'roll_through',
    None,
    ['pixels', 'features'],
    'What is fed back; pixels with --decode, features without.',
  )
  define.integer('max_clips', None, 'Of --evaluate, at most.')
  define.integer('batch_size', 16, 'Clips at a time.')
  define.integer('frames', None, 'Frames of a clip.')
  define.integer('resolution', None, 'Its height and width.')
  define.integer(
    'frame_step', None, 'Video frames from one frame of a clip to the next.'
  )
  define.float('fps', None, 'Or clip frames a second.')
  define.integer(
    'mask_token',
    None,
    'Mask token of the predictor; if none, the one trained for what is hidden.',
  )
  define.string('positions', None, 'Of an official file: sincos or rope_tiled.')
  define.integer('predictor_heads', None, "Of an official file's predictor.")


def main(options: SimpleNamespace, workdir: str) -> None:
  """Predicts with a workdir, a Hugging Face folder or an official file."""
  # Imported late: --help and wrong flags answer at once.
  from vjepa_jax.tools import prediction

  prediction.run(options, workdir)


if __name__ == '__main__':
  command.run(main, define_flags)
