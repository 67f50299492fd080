"""Still images, which are videos of one frame."""

import io

import numpy as np

from vjepa_jax.data.video import DecodeError

EXTENSIONS = frozenset(['.jpg', '.jpeg', '.png', '.webp'])
_MAX_PIXELS = 1 << 27


def is_image(start: bytes) -> bool:
  """Says by the first 16 bytes of a file whether it is an image."""
  is_webp = start[:4] == b'RIFF' and start[8:12] == b'WEBP'
  return is_webp or start.startswith((b'\xff\xd8\xff', b'\x89PNG'))


def decode(content: bytes) -> np.ndarray:
  """Decodes an image, upright, uint8 [H, W, 3].

  Raises:
    DecodeError: It is damaged, cut off or too large.
  """
  # Imported late: what reads videos starts sooner.
  from PIL import Image, ImageOps

  try:
    with Image.open(io.BytesIO(content)) as image:
      if image.width * image.height > _MAX_PIXELS:
        raise DecodeError(
          f'an image of {image.width}x{image.height} pixels is too large'
        )
      return np.array(ImageOps.exif_transpose(image).convert('RGB'))
  except DecodeError:
    raise
  except Exception as e:  # What reads images and their tags has no common one.
    reason = ' '.join(str(e).replace(str(io.BytesIO), '').split())
    raise DecodeError(f'cannot read the image: {reason}') from e
