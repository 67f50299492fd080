"""Encoders, predictor and probes as pure Flax modules."""
