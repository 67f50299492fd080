"""Data that is made: rendered and cut videos with known answers."""
