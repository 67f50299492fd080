"""What tests of main.py share."""

import processes
import pytest


@pytest.fixture(scope='module')
def launcher(toy_videos, compilation_cache):
  launcher = processes.Launcher(toy_videos, compilation_cache)
  yield launcher
  launcher.close()
