"""Makes one page about a run: report.html, which needs no other file.

python -m vjepa_jax.tools.report runs/quickstart
python -m vjepa_jax.tools.report --output=/tmp/mine.html runs/mine

At the top it says whether the run is healthy; below come the model, the curves,
masks and features over frames, and the results and pictures that other tools
left in folders of the run. The run may be going on. Works on the CPU: an
accelerator that a run is using is left alone.
"""

from types import SimpleNamespace

from etils import epath
import jax

from vjepa_jax.tools import command
from vjepa_jax.tools.report import page


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.string(
    'output', None, 'File to write; WORKDIR/report.html by default.'
  )
  define.bool(
    'encode',
    True,
    'Encode a few clips, for the picture of the features: seconds for a small '
    'encoder, minutes for a large one.',
  )


def main(options: SimpleNamespace, workdir: str) -> None:
  """Makes the report of a run."""
  jax.config.update('jax_platforms', 'cpu')
  html = page.render(epath.Path(workdir), encode=options.encode)
  output = epath.Path(options.output or epath.Path(workdir) / 'report.html')
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(html)
  print(f'report: {output} ({len(html) / 2**20:.1f} MiB)')


if __name__ == '__main__':
  command.run(main, define_flags)
