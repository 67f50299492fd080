"""Makes one page about a run: report.html, which needs no other file.

python -m vjepa_jax.tools.report runs/quickstart
python -m vjepa_jax.tools.report --output=/tmp/mine.html runs/mine

At the top it says whether the run is healthy; below come the model, the curves,
masks and features over frames, and the results and pictures that other tools
left in folders of the run. The run may be going on. Works on the CPU: an
accelerator that a run is using is left alone.
"""

import sys

from absl import app, flags, logging
from etils import epath
import jax

from vjepa_jax import mistakes
from vjepa_jax.tools.report import page

_OUTPUT = flags.DEFINE_string(
  'output', None, 'File to write; WORKDIR/report.html by default.'
)
_ENCODE = flags.DEFINE_bool(
  'encode',
  True,
  'Encode a few clips, for the picture of the features: seconds for a small '
  'encoder, minutes for a large one.',
)


def main(argv: list[str]) -> None:
  """Makes the report of the workdir on the command line."""
  if len(argv) != 2:
    raise ValueError('give one workdir, as in: report runs/quickstart')
  logging.get_absl_handler().addFilter(
    lambda record: 'vjepa_jax' in record.pathname
  )
  jax.config.update('jax_platforms', 'cpu')
  workdir = epath.Path(argv[1])
  html = page.render(workdir, encode=_ENCODE.value)
  output = epath.Path(_OUTPUT.value or workdir / 'report.html')
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(html)
  print(f'report: {output} ({len(html) / 2**20:.1f} MiB)')


if __name__ == '__main__':
  try:
    app.run(main, flags_parser=mistakes.parse_flags)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(mistakes.explain(error))
