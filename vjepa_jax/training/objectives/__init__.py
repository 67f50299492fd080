"""What is trained, and for what: one file an objective, and their parts."""
