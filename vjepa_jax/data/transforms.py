"""Augmentations of a clip: boxes to crop, and the horizontal flip.

A crop is only a box here. The decoder applies it, so that no pixel outside it
is ever converted.
"""

import math

import numpy as np

Box = tuple[int, int, int, int]

_CROP_ATTEMPTS = 10


def random_resized_crop(
  height: int,
  width: int,
  *,
  scale: tuple[float, float] = (0.3, 1.0),
  aspect_ratio: tuple[float, float] = (0.75, 1.35),
  rng: np.random.Generator,
) -> Box:
  """Draws the box of a random resized crop, one for a whole clip.

  The area is uniform, the aspect ratio log-uniform. After 10 boxes that do not
  fit, the largest centred box with the nearest allowed aspect ratio is taken.
  The defaults are those of V-JEPA 1 and 2 pretraining.

  Args:
    height: of the frame, in pixels.
    width: of the frame, in pixels.
    scale: range of the area of the box relative to the frame.
    aspect_ratio: range of width / height of the box.
    rng: the source of randomness.

  Returns:
    (top, left, height, width) in pixels.
  """
  log_ratio = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
  for _ in range(_CROP_ATTEMPTS):
    area = height * width * rng.uniform(*scale)
    ratio = math.exp(rng.uniform(*log_ratio))
    box_height = round(math.sqrt(area / ratio))
    box_width = round(math.sqrt(area * ratio))
    if 0 < box_height <= height and 0 < box_width <= width:
      top = int(rng.integers(height - box_height + 1))
      left = int(rng.integers(width - box_width + 1))
      return top, left, box_height, box_width
  return crop_to_aspect(height, width, aspect_ratio)


def crop_to_aspect(
  height: int, width: int, aspect_ratio: tuple[float, float] = (0.75, 1.35)
) -> Box:
  """Returns the largest centred box whose width / height is in a range.

  It is all that is left of the random crop in the published training of V-JEPA
  2-AC, whose boxes are larger than any frame.
  """
  box_height, box_width = height, width
  if width / height < aspect_ratio[0]:
    box_height = max(round(width / aspect_ratio[0]), 1)
  elif width / height > aspect_ratio[1]:
    box_width = max(round(height * aspect_ratio[1]), 1)
  return _center(height, width, box_height, box_width)


def center_crop(height: int, width: int) -> Box:
  """Returns the centred square of the evaluation protocol.

  The published evaluation resizes the short side to int(crop * 256 / 224) and
  takes the central crop x crop pixels. This is the same square in the original
  frame, to be resized to crop x crop: exactly where crop is 224, and else but
  for the truncation.

  Args:
    height: of the frame, in pixels.
    width: of the frame, in pixels.

  Returns:
    (top, left, side, side) in pixels.
  """
  side = max(round(min(height, width) * 224 / 256), 1)
  return _center(height, width, side, side)


def spread_crops(height: int, width: int, count: int) -> list[Box]:
  """Returns squares of the full short side, spread along the long side.

  The published views of a clip: three crops after a resize of the short side
  to the resolution (V-JEPA 1, section 4).

  Args:
    height: of the frame, in pixels.
    width: of the frame, in pixels.
    count: Squares, at least 2: the first and the last touch the ends.

  Returns:
    (top, left, side, side) in pixels, each.
  """
  side = min(height, width)
  ends = np.linspace((0, 0), (height - side, width - side), count).round()
  return [(int(top), int(left), side, side) for top, left in ends]


def flip_horizontal(clip: np.ndarray) -> np.ndarray:
  """Mirrors a clip [..., H, W, C] left to right, as a contiguous copy."""
  return np.ascontiguousarray(clip[..., ::-1, :])


def _center(height: int, width: int, box_height: int, box_width: int) -> Box:
  top, left = (height - box_height) // 2, (width - box_width) // 2
  return top, left, box_height, box_width
