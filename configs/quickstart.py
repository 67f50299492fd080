"""Ten minutes on two CPU cores: real video in, a table and a picture out.

  python main.py --config=configs/quickstart.py --workdir=runs/quickstart

The recipe of configs/small.py with a third of its steps.
"""

from configs import base, small


def get_config(arg: str | None = None):
  """Returns the recipe; it has no options."""
  base.parse_arg(arg, variant='default')
  config = small.get_config()
  config.total_steps = 500
  return config
