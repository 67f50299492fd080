"""The order of pictures by what headers of H.264 say, without a video."""

from vjepa_jax.data import h264


def test_counts_half_a_period_ahead_are_later():
  """As in section 8.2.1.1, with counts of 4 bits and three pictures between."""
  counts = [0, 8, 2, 4, 6, 16, 10, 12, 14]
  pictures = [
    h264._Picture(is_idr=not i, is_reference=not count % 8, count=count % 16)
    for i, count in enumerate(counts)
  ]
  assert [count for _, count in h264._count_on(pictures, 16)] == counts
