"""The device mesh and how arrays are laid out on it."""
