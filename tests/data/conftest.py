"""Encoded videos of all kinds, rendered once."""

from collections.abc import Callable
import pathlib

import pytest
from variants import VARIANTS, write_video


@pytest.fixture(scope='session')
def videos(tmp_path_factory) -> Callable[[str], pathlib.Path]:
  """Gives the path of a variant, which is encoded on first use."""
  folder = tmp_path_factory.mktemp('videos')

  def get(name: str) -> pathlib.Path:
    path = folder / name
    if not path.exists():
      write_video(path, **VARIANTS[name])
    return path

  return get
