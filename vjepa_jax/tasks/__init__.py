"""What main.py can do: one linear program each."""
