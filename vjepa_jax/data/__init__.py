"""From video files to batches of clips and masks, on the host, without JAX."""
