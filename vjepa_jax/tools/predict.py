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

import json
from types import SimpleNamespace

from etils import epath

from vjepa_jax.data import storage
from vjepa_jax.errors import UserError
from vjepa_jax.tools import command
from vjepa_jax.world.masks import HIDDEN


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('video', 'Video to predict a part of.')
  define.string('evaluate', 'Held-out videos to average over, any source.')
  define.string('output', 'Folder; WORKDIR/predict if none.')
  define.enum('hide', 'What is hidden.', 'future', HIDDEN)
  define.integer(
    'context_frames',
    'Frames that are visible; half the clip if none, and 0 for a region, which '
    'is hidden after them.',
  )
  define.list(
    'box',
    'Of a region: top, left, height, width, in shares of the frame.',
    ['0.25', '0.25', '0.5', '0.5'],
  )
  define.float('start', 'Where the clip begins, seconds.', 0.0)
  define.string(
    'gallery',
    'Videos to find nearest frames in, and to take statistics of features '
    'from; those of training if none, or else the video itself.',
  )
  define.integer('gallery_clips', 'At most so many.', 256)
  define.string('decode', 'Workdir of configs/decoder.py: imagine pixels.')
  define.integer('roll', 'Windows to go on for.', 0, least=0)
  define.enum(
    'roll_through',
    'What is fed back; pixels with --decode, features without.',
    None,
    ['pixels', 'features'],
  )
  define.integer('max_clips', 'Of --evaluate, at most.')
  define.integer('batch_size', 'Clips at a time.', 16)
  define.integer('frames', 'Frames of a clip.')
  define.integer('resolution', 'Its height and width.')
  define.integer('frame_step', 'Video frames a clip frame.')
  define.float('fps', 'Or clip frames a second.')
  define.integer('mask_token', 'The one trained for what is hidden if none.')
  define.string('positions', 'Of an official file, see models/positions.py.')
  define.string(
    'predictor_positions',
    'Of a V-JEPA 2.1 file: rope_rescaled as trained, rope_interleaved as '
    'torch.hub has it.',
  )
  define.integer('predictor_heads', "Of an official file's predictor.")


def main(options: SimpleNamespace, workdir: str) -> None:
  """Predicts; of `results.json` a part that is not asked for stays."""
  if options.video is None and options.evaluate is None:
    raise UserError('give --video=FILE, --evaluate=MANIFEST or both')
  # Imported late: --help and wrong flags answer at once.
  from vjepa_jax.tools.prediction import Session

  session = Session(options, workdir)
  folder = epath.Path(workdir)
  output = folder / 'predict' if folder.is_dir() else 'predict'
  output = epath.Path(options.output or output)
  output.mkdir(parents=True, exist_ok=True)
  path = output / 'results.json'
  results = json.loads(path.read_text()) if path.exists() else {}
  if options.video is not None:
    results['video'] = session.predict_video(output)
    storage.replace(path, json.dumps(results, indent=2) + '\n')
  if options.evaluate is not None:
    results['evaluation'] = session.evaluate()
    storage.replace(path, json.dumps(results, indent=2) + '\n')
  print(f'results: {path}')


if __name__ == '__main__':
  command.run(main, define_flags)
