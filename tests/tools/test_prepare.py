"""Tests of packing videos into shards."""

import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import time

import av
from commands import start_command
from killers import Greedy, Killer, Killers, Terminated
import numpy as np
import pytest

from vjepa_jax.data import decode, sources
from vjepa_jax.data.records import Record
from vjepa_jax.tools import prepare

_ENCODING = prepare.Encoding(short_side=48, fps=7.5, gop=4)


def _write_video(path: pathlib.Path, codec: str, seed: int = 0) -> None:
  """Encodes 40 frames of 64x96 at 30 fps with a bar at twice their number."""
  rng = np.random.default_rng(seed)
  texture = rng.integers(0, 60, (64, 96, 3), dtype=np.uint8)
  with av.open(path, 'w') as container:
    stream = container.add_stream(codec, rate=30)
    stream.width, stream.height, stream.pix_fmt = 96, 64, 'yuv420p'
    stream.codec_context.thread_count = 1
    for i in range(40):
      pixels = texture.copy()
      pixels[:, 2 * i : 2 * i + 8] = 255
      frame = av.VideoFrame.from_ndarray(pixels, 'rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp('originals')
  names = ['a.mp4', 'b.avi', 'c.mpg', 'e.webm', 'f.mov', 'g.mkv']
  codecs = ['libx264', 'mpeg4', 'mpeg2video', 'libvpx', 'libx264', 'libx264']
  for i, (name, codec) in enumerate(zip(names, codecs, strict=True)):
    _write_video(root / name, codec, seed=i)
  (root / 'd.mp4').write_text('not a video')
  (root / 'h.mp4').touch()
  return root


def _run(folder, output, encoding=_ENCODING, shard_size=3):
  source, output = sources.open_source(str(folder)), str(output)
  prepare.prepare(
    source, output, encoding, shard_size=shard_size, num_workers=0
  )


def _read_files(output: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in sorted(output.iterdir())}


def _read_bad(output: pathlib.Path) -> list[tuple[str, str, int]]:
  lines = (output / 'bad_files.jsonl').read_text().splitlines()
  return [tuple(json.loads(line).values()) for line in lines]


def test_reencodes(folder, tmp_path, caplog):
  _run(folder, tmp_path)
  assert _read_bad(tmp_path) == [
    ('d.mp4', 'not a video, or its header is damaged or cut off', 1),
    ('h.mp4', 'empty file', 2),
  ]
  records = list(sources.open_source(str(tmp_path)))
  names = ['a.mp4', 'b.avi', 'c.mpg', 'e.webm', 'f.mov', 'g.mkv']
  assert [r.name for r in records] == names
  for record in records:
    with decode.open_video(record.video) as video:
      assert (video.height, video.width) == (48, 72)
      assert video.num_frames == 10
      assert video.fps == pytest.approx(7.5)
      clip = video.read(range(10), (0, 0, 48, 72), (48, 72))
    # Every fourth frame; the bar moves by 1.5 pixels from one to the next.
    is_bar = clip.mean((1, 3)) > 150  # [T, W]
    bar = (is_bar * np.arange(72)).sum(1) / is_bar.sum(1)
    np.testing.assert_allclose(bar, 2.5 + 1.5 * np.arange(0, 40, 4), atol=0.7)


def test_copies_as_is_and_keeps_labels(folder, tmp_path):
  manifest = folder / 'list.csv'
  manifest.write_text('b.avi,4\nd.mp4,1\nmissing.mp4,1\na.mp4,2\n')
  _run(manifest, tmp_path, encoding=None)
  records = list(sources.open_source(str(tmp_path)))
  assert [(r.name, r.label) for r in records] == [('b.avi', 4), ('a.mp4', 2)]
  assert records[0].video == (folder / 'b.avi').read_bytes()
  missing = _read_bad(tmp_path)[1]
  assert missing[:2] == ('missing.mp4', 'file does not exist')


@pytest.mark.parametrize(
  'encoding', [prepare.Encoding(None, None, 6), prepare.Encoding(1000, 60.0, 8)]
)
def test_keeps_size_and_times(folder, encoding):
  with decode.open_video(str(folder / 'a.mp4')) as video:
    content = prepare.transcode(video, encoding)
    with decode.open_video(content) as result:
      assert (result.height, result.width) == (64, 96)
      assert result.num_frames == (80 if encoding.fps else 40)
      if not encoding.fps:
        np.testing.assert_allclose(result.times, video.times, atol=1e-3)
  with av.open(io.BytesIO(content)) as container:
    packets = [p for p in container.demux(video=0) if p.size]
  keys = np.flatnonzero([p.is_keyframe for p in packets])
  assert np.diff(keys).max() <= encoding.gop


def test_resumes_to_identical_bytes(folder, tmp_path, monkeypatch):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  _run(folder, whole)
  convert, calls = prepare.convert, []

  def stop_at_the_eighth(*args, **options):
    calls.append(args)
    if len(calls) == 8:
      raise KeyboardInterrupt
    return convert(*args, **options)

  monkeypatch.setattr(prepare, 'convert', stop_at_the_eighth)
  with pytest.raises(KeyboardInterrupt):
    _run(folder, parts)
  left = sorted(p.name for p in parts.glob('videos-*.array_record'))
  assert left == [f'videos-0000{i}-of-00003.array_record' for i in range(2)]
  # As if killed between writing down other bad files and finishing the shard.
  (parts / 'videos-00002-of-00003.bad.jsonl').write_text('{"name": "g.mkv"}\n')
  monkeypatch.setattr(prepare, 'convert', convert)
  kept = (parts / left[0]).stat().st_mtime_ns
  _run(folder, parts)
  assert (parts / left[0]).stat().st_mtime_ns == kept
  assert _read_files(parts) == _read_files(whole)
  monkeypatch.setattr(prepare, 'convert', None)  # Nothing is left to do.
  _run(folder, parts)


def test_what_others_left_in_the_folder_is_respected(folder, tmp_path):
  _run(folder, tmp_path)
  expected = _read_bad(tmp_path)
  # The version before listed all bad files in one list alone.
  for path in tmp_path.glob('*.bad.jsonl'):
    path.unlink()
  (tmp_path / 'videos-00001-of-00003.array_record').unlink()
  unfinished = tmp_path / 'videos-00001-of-00003.array_record.host-1.tmp'
  unfinished.touch()
  # Shards of the same names further down are others.
  old = tmp_path / 'old'
  old.mkdir()
  (old / 'videos-00001-of-00003.array_record').touch()
  # Its options are compared with these.
  options = json.loads((tmp_path / 'prepare.json').read_text())
  names = sorted(path.name for path in folder.glob('?.*'))
  text = ''.join(f'{name} -1\n' for name in names)
  digest = hashlib.sha256(text.encode()).hexdigest()
  assert options['videos_sha256'] == digest
  _run(folder, tmp_path)
  assert len(sources.open_source(str(tmp_path))) == 6
  assert _read_bad(tmp_path) == expected
  assert not unfinished.exists()


def test_other_options_are_an_error(folder, tmp_path):
  _run(folder, tmp_path)
  other = _ENCODING._replace(short_side=32)
  with pytest.raises(ValueError, match="'short_side': 48.*'short_side': 32"):
    _run(folder, tmp_path, encoding=other)
  with pytest.raises(ValueError, match='num_videos was 8 and is now 1'):
    _run(folder / 'a.mp4', tmp_path)


def test_all_bad_leaves_readable_shards(tmp_path):
  videos, out = tmp_path / 'videos', tmp_path / 'out'
  videos.mkdir()
  for i in range(3):
    (videos / f'{i}.mp4').write_text('not a video')
  _write_video(videos / '9.mp4', 'libx264')
  _run(videos, out)
  assert [r.name for r in sources.open_source(str(out))] == ['9.mp4']


def test_a_video_that_kills_workers_is_left_out(folder, tmp_path):
  source = sources.open_source(str(folder))
  for output, videos, workers in (
    ('a', {1: Killer(b'v'), 4: Greedy(b'v')}, 2),
    ('b', {1: b'bad', 4: b'bad'}, 0),
  ):
    prepare.prepare(
      Killers(source, videos),
      str(tmp_path / output),
      _ENCODING,
      shard_size=3,
      num_workers=workers,
    )
  found, expected = (_read_files(tmp_path / x) for x in 'ab')
  names = {n for n in expected if n.endswith('.array_record')}
  assert {n: found[n] for n in names} == {n: expected[n] for n in names}
  bad = _read_bad(tmp_path / 'a')
  assert [b[0] for b in bad] == [b[0] for b in _read_bad(tmp_path / 'b')]
  reasons = dict(b[:2] for b in bad)
  assert reasons['b.avi'] == 'kills its reader: SIGSEGV'
  assert reasons['e.webm'] == 'kills its reader: SIGKILL'


@pytest.mark.slow
def test_what_is_wrong_with_the_machine_is_not_blamed_on_videos():
  records = [Record(Terminated(b'v'), -1, 'a.mp4')]
  with pytest.raises(RuntimeError, match='end by themselves, .*: SIGTERM'):
    list(prepare._convert_all(records, None, 1))
  killers = [prepare.BadFile('a.mp4', 'kills its reader: SIGILL')] * 5
  with pytest.raises(RuntimeError, match='5 files in a row'):
    list(prepare._doubt_killers(killers))
  assert list(prepare._doubt_killers([*killers[:4], b'', *killers[:4]]))


@pytest.mark.slow
def test_a_script_that_cannot_have_workers_is_told(folder, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(
    'from vjepa_jax.data import sources\n'
    'from vjepa_jax.tools import prepare\n'
    f'source = sources.open_source({str(folder)!r})\n'
    f'prepare.prepare(source, {str(tmp_path / "out")!r}, None,\n'
    '  shard_size=3, num_workers=2)\n'
  )
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  done = subprocess.run(
    [sys.executable, script], capture_output=True, text=True, env=environment
  )
  assert done.returncode == 1
  assert 'no worker process can be started' in done.stderr
  assert not list((tmp_path / 'out').glob('*.array_record*'))


@pytest.mark.slow
def test_machines_share_the_work_and_one_is_killed(folder, tmp_path):
  out = tmp_path / 'out'
  arguments = [
    f'--input={folder}',
    f'--output={out}',
    *('--short_side=48', '--fps=7.5', '--gop=4', '--shard_size=1'),
  ]
  command = [sys.executable, '-m', 'vjepa_jax.tools.prepare', *arguments]
  array = {'SLURM_ARRAY_TASK_MIN': '1', 'SLURM_ARRAY_TASK_COUNT': '3'}

  def start(task):
    environment = os.environ | array | {'SLURM_ARRAY_TASK_ID': str(task)}
    return subprocess.Popen(
      [*command, '--num_hosts=auto'],
      env=environment,
      text=True,
      stderr=subprocess.PIPE,
    )

  machines = [start(task) for task in (1, 2, 3)]
  # The second writes shards 1, 4 and 7.
  first = out / 'videos-00001-of-00008.array_record'
  deadline = time.time() + 60
  while not first.exists() and time.time() < deadline:
    time.sleep(0.01)
  machines[1].kill()
  for machine in machines:
    machine.communicate()
  assert [machine.returncode for machine in machines] == [0, -9, 0]
  again = start(2)
  _, log = again.communicate()
  assert again.returncode == 0, log
  assert 'machine 1 of 3, by SLURM_ARRAY_TASK_ID' in log
  _run(folder, tmp_path / 'expected', shard_size=1)
  assert _read_files(out) == _read_files(tmp_path / 'expected')
  done = start_command('prepare', *arguments, '--num_workers=2')
  assert done.returncode == 0 and 'Nothing to do' in done.stderr
  # One machine with workers makes the same, whatever was bad before.
  first.unlink()
  stale = out / 'videos-00001-of-00008.bad.jsonl'
  stale.write_text('{"name": "b.avi", "reason": "was missing"}\n')
  done = start_command('prepare', *arguments, '--num_workers=2')
  assert 'Keeping 7 of 8 shards' in done.stderr
  assert _read_files(out) == _read_files(tmp_path / 'expected')
