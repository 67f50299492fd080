"""Self-supervised pretraining of video encoders by V-JEPA, in JAX."""
