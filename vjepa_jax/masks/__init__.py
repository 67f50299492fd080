"""Tubelet masks, drawn by numpy on the host; nothing here imports jax."""
