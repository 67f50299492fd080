"""Fifteen minutes on two CPU cores: real video in, a table and a picture out.

  python main.py --config=configs/quickstart.py --workdir=runs/quickstart

The recipe for one machine as it is, see configs/small.py.
"""

from configs import base, small


def get_config(arg: str | None = None):
  """Returns the recipe; it has no options."""
  base.parse_arg(arg, variant='default')
  return small.get_config()
