"""Command-line programs that run before or beside training."""
