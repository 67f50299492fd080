"""From decoded pictures to cropped and resized RGB."""

import functools

import av
import cv2
import numpy as np

# Parallelism comes from the worker processes: OpenCV's pool would only compete
# with them.
cv2.setNumThreads(0)

# (K_r, K_b) of the luma equation, by libav's colour space number (the values
# of ITU-T H.273); untagged video is BT.601, as in libswscale.
_LUMA_WEIGHTS = {
  1: (0.2126, 0.0722),  # BT.709
  4: (0.30, 0.11),  # FCC
  7: (0.212, 0.087),  # SMPTE 240M
  9: (0.2627, 0.0593),  # BT.2020
  10: (0.2627, 0.0593),
}
_BT601 = (0.299, 0.114)
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG

Box = tuple[int, int, int, int]


def turn_box_back(box: Box, coded_size: tuple[int, int], turns: int) -> Box:
  """Maps a box in the displayed frame to the frame as it was coded.

  Args:
    box: (top, left, height, width) after turning.
    coded_size: (height, width) before turning.
    turns: quarter turns counter-clockwise from coded to displayed.

  Returns:
    (top, left, height, width) before turning.
  """
  top, left, height, width = box
  coded_height, coded_width = coded_size
  if turns == 1:
    return left, coded_width - top - height, width, height
  if turns == 2:
    top, left = coded_height - top - height, coded_width - left - width
    return top, left, height, width
  if turns == 3:
    return coded_height - left - width, top, width, height
  return box


def convert_planes(
  frame: av.VideoFrame, box: Box, size: tuple[int, int]
) -> np.ndarray:
  """Crops and resizes the planes of a 4:2:0 frame, then converts to RGB."""
  top, left, height, width = box
  # With odd edges the chroma crop is rounded outwards: at most half a chroma
  # sample of misalignment.
  bottom, right = -(-(top + height) // 2), -(-(left + width) // 2)
  top_c, left_c = top // 2, left // 2
  chroma_box = top_c, left_c, bottom - top_c, right - left_c
  planes = []
  for plane, plane_box in zip(
    frame.planes, (box, chroma_box, chroma_box), strict=True
  ):
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    planes.append(resize(crop(rows, plane_box), size))
  full_range = (
    frame.format.name == 'yuvj420p' or frame.color_range == _FULL_RANGE
  )
  matrix = _build_rgb_matrix(int(frame.colorspace), full_range)
  return cv2.transform(cv2.merge(planes), matrix)


@functools.cache
def _build_rgb_matrix(colorspace: int, full_range: bool) -> np.ndarray:
  """Builds the affine map from 8-bit Y'CbCr to R'G'B', float32 [3, 4].

  Args:
    colorspace: matrix coefficients number of ITU-T H.273.
    full_range: whether luma spans 0..255 rather than 16..235.

  Returns:
    The matrix with its offsets in the last column (ITU-T H.273, section 8.3).
  """
  k_r, k_b = _LUMA_WEIGHTS.get(colorspace, _BT601)
  k_g = 1 - k_r - k_b
  luma, chroma, black = (1, 1, 0) if full_range else (255 / 219, 255 / 224, 16)
  red, blue = 2 * (1 - k_r) * chroma, 2 * (1 - k_b) * chroma
  matrix = np.array(
    [
      [luma, 0, red],
      [luma, -blue * k_b / k_g, -red * k_r / k_g],
      [luma, blue, 0],
    ]
  )
  offset = -matrix @ [black, 128, 128]
  return np.concatenate([matrix, offset[:, None]], axis=1).astype(np.float32)


def crop(image: np.ndarray, box: Box) -> np.ndarray:
  """Crops [H, W, ...] to a box (top, left, height, width)."""
  top, left, height, width = box
  return image[top : top + height, left : left + width]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes [H, W, ...] to `size` (height, width), without antialiasing."""
  return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
