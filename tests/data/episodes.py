"""Episodes of a made robot: a film whose brightness counts its frames."""

import math

import numpy as np

from vjepa_jax.data.encode import write_video

RATE = 10  # rows a second
STEP = 5  # brightness from one frame to the next


def make_states(rng, rows, kind='pose'):
  """Makes states `[rows, 7]`, or of a plain kind `[rows, 2]`."""
  if kind == 'plain':
    return np.cumsum(rng.uniform(-0.1, 0.1, (rows, 2)), axis=0)
  places = np.cumsum(rng.uniform(-0.05, 0.05, (rows, 3)), axis=0)
  angles = np.array([math.pi - 0.01, 0.2, -0.5])
  angles = angles + rng.uniform(-0.03, 0.009, (rows, 3))
  return np.concatenate([places, angles, rng.random((rows, 1))], axis=1)


def write_episodes(folder, count, rows=20, size=(32, 48), kind='pose'):
  """Writes `NAME.mp4` and `NAME.npz`; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for i in range(count):
    frames = np.zeros((rows, *size, 3), np.uint8)
    frames += (20 + STEP * np.arange(rows, dtype=np.uint8))[:, None, None, None]
    write_video(folder / f'{i:03}.mp4', frames, 30)
    times = (np.arange(rows) + rng.uniform(-0.2, 0.2, rows)) / RATE
    states = make_states(rng, rows, kind).astype(np.float32)
    extrinsics = rng.normal(size=(rows, 6)).astype(np.float32)
    np.savez(
      folder / f'{i:03}.npz',
      states=states,
      timestamps=times,
      extrinsics=extrinsics,
    )
  return folder
