"""Tubelet masks, drawn by numpy on the host; nothing here imports jax."""

Grid = tuple[int, int, int]  # tubelets in (time, height, width)
