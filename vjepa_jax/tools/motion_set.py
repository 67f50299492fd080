"""Writes the labelled motion set of the quickstart.

python -m vjepa_jax.tools.motion_set --output=data/motion --preview=motion.png
"""

from pathlib import Path
from types import SimpleNamespace

from vjepa_jax.data import storage
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
  define.string('output', 'Folder of the set.', 'data/motion')
  define.string('videos', 'Folder of videos to cut from; if none, fetched.')
  define.integer('num_train', 'Training clips.', 4000)
  define.integer('num_test', 'Test clips.', 800)
  define.integer('seed', 'Seed.', 0)
  define.string('preview', 'PNG to draw: two clips of each class.')


def main(options: SimpleNamespace) -> None:
  """Writes the set and, if asked for, its preview."""
  with storage.writing_folder(options.output) as folder:
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
    if options.preview:
      draw_preview(folder, options.preview)
  print(
    f'{options.num_train} training and {options.num_test} test clips of '
    f'{len(motion.CLASSES)} motions are in {options.output}'
  )
  if options.preview:
    print(f'picture: {options.preview}')


if __name__ == '__main__':
  command.run(main, define_flags)
