"""The train step and what surrounds it."""
