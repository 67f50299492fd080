"""Weights of published checkpoints and Hugging Face folders, in and out."""
