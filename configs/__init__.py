"""Recipes: one file each, `get_config(arg)`; the docstring is the command."""
