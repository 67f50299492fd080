"""Every picture, drawn from arrays."""
