"""Progress bars with rate and time left, on terminals and in log files."""

import sys
from typing import Any

import tqdm


def make_bar(*args: Any, **options: Any) -> tqdm.tqdm:
  """Makes a tqdm bar that writes a log file a line now and then."""
  interval = 0.2 if sys.stderr.isatty() else 15.0
  return tqdm.tqdm(*args, mininterval=interval, dynamic_ncols=True, **options)
