"""Mistakes and limits, for `bench faults`."""

import concurrent.futures
import os
from pathlib import Path
import re
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from array_record.python import array_record_module

from vjepa_jax.bench import runs
from vjepa_jax.data import records, sources
from vjepa_jax.sets.toy import write_toy_videos

# In them `{videos}` is a manifest of videos, `{folder}` an empty folder.
_TRAIN = 'train --workdir={folder}/run'
_SMALL = f'{_TRAIN} --config=configs/small.py --config.task=pretrain'
_RUN = f'{_SMALL} --config.data.sources.videos.path={{videos}}'

WRONG_COMMANDS = (
  # Flags.
  'train',
  'train --config=configs/small.py',
  f'{_SMALL} --no_such_flag=1',
  f'{_SMALL} surplus',
  f'{_SMALL} --profile_steps=5',
  f'{_RUN} --profile_steps=5:999999',
  f'{_SMALL} --num_processes=two',
  'train --config=configs/small.py --workdir={videos}',
  # Recipes and fields.
  f'{_TRAIN} --config=configs/none.py',
  f'{_TRAIN} --config=configs/vjepa1.py:x99',
  f'{_TRAIN} --config=configs/vjepa1.py:size=l16',
  f'{_TRAIN} --config=configs/vjepa2.py:stage=last',
  f'{_SMALL} --config.batchsize=8',
  f'{_SMALL} --config.data.batchsize=8',
  f'{_SMALL} --config.data.batch_size=many',
  f'{_SMALL} --config.task=dance',
  # Data.
  _SMALL,
  f'{_SMALL} --config.data.sources.videos.path={{folder}}/none',
  f'{_SMALL} --config.data.sources.videos.path={{folder}}',
  f'{_SMALL} --config.data.sources.videos.path={{folder}}/none.csv',
  f'{_SMALL} --config.data.sources.videos.path={{folder}}/*.array_record',
  f'{_SMALL} --config.data.sources.videos.path=tfds:none',
  # What does not go together.
  f'{_RUN} --config.clip.fps=4',
  f'{_RUN} --config.clip.resolution=36',
  f'{_RUN} --config.data.batch_size=7',
  f'{_RUN} --config.encoder.size=enormous',
  f'{_RUN} --config.encoder.positions=absolute',
  f'{_RUN} --config.objective.kind=none',
  f'{_RUN} --config.optimizer.kind=none',
  f'{_RUN} --config.fsdp=5',
  f'{_RUN} --config.microbatches=3',
  f'{_RUN} --config.total_epochs=1',
  f'{_RUN} --config.learning_rate.warmup_steps=999999',
  f'{_RUN} --config.init_from={{folder}}/none',
  f'{_RUN} --config.masks.random.context_tokens=999',
  # Other commands.
  'prepare --input={folder}/none --output={folder}/shards',
  'extract --backbone={folder}/none --input={videos} --output={folder}/out',
  'convert --from={folder}/none --to={folder}/out',
  'report {folder}/none',
  'plan --config=configs/vjepa1.py --topology=v99:2x2',
)


def measure_wrong_commands(folder: Path, quick: bool) -> dict[str, Any]:
  """Gives commands with a mistake in each: one line, exit code 2."""
  texts = WRONG_COMMANDS[:16:8] if quick else WRONG_COMMANDS
  videos = write_toy_videos(folder / 'videos', 24)
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '2',
  }

  def try_command(text):
    with tempfile.TemporaryDirectory(dir=folder) as empty:
      words = [w.format(videos=videos, folder=empty) for w in text.split()]
      command = [sys.executable, '-m', f'vjepa_jax.tools.{words[0]}']
      begin = time.monotonic()
      try:
        done = subprocess.run(
          [*command, *words[1:]],
          env=environment,
          capture_output=True,
          text=True,
          timeout=300,
        )
      except subprocess.TimeoutExpired:
        return False, 300.0
      seconds = time.monotonic() - begin
    told = done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    return told and done.returncode == 2, seconds

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    found = list(pool.map(try_command, texts))
  for text, (good, _) in zip(texts, found, strict=True):
    if not good:
      print(f'not one line and exit code 2: {text}', file=sys.stderr)
  return {
    'commands with a mistake: one line, exit code 2': {
      'tried': len(found),
      'good': sum(good for good, _ in found),
      'worst': f'{max(seconds for _, seconds in found):.1f} s',
    }
  }


def measure_descriptors(folder: Path, quick: bool) -> dict[str, Any]:
  """Reads a record of each of 4,000 shards under a limit of descriptors."""
  count, limit = (80, 64) if quick else (4000, 1024)
  limit += len(os.listdir('/proc/self/fd')) if quick else 0
  shards = folder / 'shards'
  shards.mkdir()
  write_shard(folder / 'one', [records.pack(records.Record(b'0', 0, 'x'))])
  for i in range(count):
    os.link(folder / 'one', shards / f'{i:04d}.array_record')
  _, hard = soft_and_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
  good, worst = 0, ''
  try:
    begin = time.monotonic()
    source = sources.open_source(str(shards))
    worst = f'opened in {time.monotonic() - begin:.1f} s'
    for i in range(count):
      good += source[i].name == 'x'
  except (OSError, RuntimeError, ValueError) as error:
    worst = str(error).partition('\n')[0]
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, soft_and_hard)
  figure = {'tried': count, 'good': good, 'worst': worst}
  return {f'shards read under {limit} file descriptors': figure}


def measure_memory(folder: Path, quick: bool) -> dict[str, Any]:
  """Compares what reading ahead takes with the bound that a run prints.

  What a run takes beside it is what the same run takes that reads little ahead.
  """
  videos = write_toy_videos(folder / 'videos', 24)
  flags = [
    f'--config.data.sources.videos.path={videos}',
    '--config.clip.resolution=224',
    '--config.encoder.tubelet=(4, 32, 32)',
    '--config.total_steps=12',
  ]
  # Compiling takes memory too: it is done once, before.
  runs.train(folder / 'compiled', flags)
  shares = []
  for workers in (0,) if quick else (0, 1, 2):
    found = []
    for clips in (24, 256):
      workdir = folder / f'run_{workers}_{clips}'
      options = [*flags, f'--config.data.num_workers={workers}']
      options += [f'--config.data.read_ahead={clips}']
      (process,) = runs.start(workdir, options)
      peak = runs.measure_peak(process)
      log = Path(f'{workdir}.log').read_text()
      printed = re.search(r'reading ahead at most \d+ clips, ([\d.]+) GiB', log)
      found.append((peak, float(printed[1])))
    (small, least), (large, most) = found
    shares.append((large - small) / (most - least))
  return {
    'memory of what is read ahead, within the printed bound': {
      'tried': len(shares),
      'good': sum(share < 1.05 for share in shares),
      'worst': f'{max(shares):.0%} of the bound',
    }
  }


def write_shard(path: Path, packed: list[bytes]) -> None:
  """Writes an ArrayRecord shard as `prepare` does."""
  writer = array_record_module.ArrayRecordWriter(
    str(path), 'group_size:1,uncompressed'
  )
  for record in packed:
    writer.write(record)
  writer.close()
