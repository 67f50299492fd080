"""Tests of the augmentations."""

import numpy as np
import pytest

from vjepa_jax.data import transforms


def test_random_boxes_keep_to_scale_and_aspect():
  rng = np.random.default_rng(0)
  areas, ratios = [], []
  for _ in range(2000):
    top, left, height, width = transforms.random_resized_crop(
      240, 320, scale=(0.3, 1.0), aspect_ratio=(0.75, 1.35), rng=rng
    )
    assert 0 <= top <= top + height <= 240
    assert 0 <= left <= left + width <= 320
    areas.append(height * width / (240 * 320))
    ratios.append(width / height)
  assert 0.295 < min(areas) < 0.31 and 0.95 < max(areas) <= 1
  assert 0.74 < min(ratios) < 0.77 and 1.32 < max(ratios) < 1.36


def test_aspect_is_log_uniform():
  rng = np.random.default_rng(0)
  ratios = []
  for _ in range(4000):
    *_, height, width = transforms.random_resized_crop(
      4000, 4000, scale=(0.05, 0.1), aspect_ratio=(0.25, 4.0), rng=rng
    )
    ratios.append(width / height)
  assert np.median(ratios) == pytest.approx(1.0, rel=0.1)
  assert np.mean(np.asarray(ratios) < 0.5) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
  ('size', 'expected'),
  [((100, 1000), (0, 432, 100, 135)), ((1000, 90), (440, 0, 120, 90))],
)
def test_falls_back_to_the_centre(size, expected):
  box = transforms.random_resized_crop(
      *size, scale=(1, 1), aspect_ratio=(0.75, 1.35),
      rng=np.random.default_rng(0),
  )  # fmt: skip
  assert box == expected


def test_same_rng_same_box():
  boxes = {
    transforms.random_resized_crop(97, 131, rng=np.random.default_rng(3))
    for _ in range(3)
  }
  assert len(boxes) == 1


def test_center_crop():
  assert transforms.center_crop(256, 340) == (16, 58, 224, 224)
  assert transforms.center_crop(480, 270) == (122, 17, 236, 236)
  assert transforms.center_crop(9, 1) == (4, 0, 1, 1)


def test_flip():
  clip = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
  flipped = transforms.flip_horizontal(clip)
  assert flipped.flags.c_contiguous
  np.testing.assert_array_equal(flipped[1, 2, 0], clip[1, 2, 4])
  np.testing.assert_array_equal(transforms.flip_horizontal(flipped), clip)
