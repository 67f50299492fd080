"""Videos that kill the process of an evaluation."""

import logging
import multiprocessing
import pathlib
import signal

from killers import Killer, Killers

from vjepa_jax.data import sources
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.data.readers import open_journal
from vjepa_jax.evaluation import classification

_KILLER = 5


def _load(videos, workdir):
  """Loads all labels as the online probe does."""
  source = Killers(sources.open_source(videos), {_KILLER: Killer(b'v')})
  options = ClipOptions(frames=2, resolution=16, frame_step=1)
  journal = open_journal(workdir, 0, 'test-')
  batches = classification.load_batches(
    source, options, 4, 8, range(8), 2, journal
  )
  return [label for _, labels in batches for label in labels.tolist()]


def test_what_kills_it_is_named_and_left_out_from_then_on(
  toy_videos, tmp_path, caplog
):
  arguments = str(toy_videos), str(tmp_path)
  process = multiprocessing.get_context('spawn').Process(
    target=_load, args=arguments
  )
  process.start()
  process.join()
  assert process.exitcode == -signal.SIGSEGV
  with caplog.at_level(logging.INFO, logger='absl'):
    labels = _load(*arguments)
  record = sources.open_source(arguments[0])[_KILLER]
  lines = [r.getMessage() for r in caplog.records if r.levelno > logging.INFO]
  assert [line.split()[0] for line in lines] == ['excluded', 'left']
  assert record.name in lines[0] and lines[0].endswith('reader, SIGSEGV')
  assert labels.count(-1) == 1 and labels[_KILLER] == -1
  excluded = pathlib.Path(tmp_path, 'exclude.txt').read_text()
  assert excluded == f'{toy_videos}: {record.name}\n'
  # Nothing is suspected any more.
  assert [path.name for path in tmp_path.iterdir()] == ['exclude.txt']
