"""Benchmarks: what is ours beside what others do, as ratios."""
