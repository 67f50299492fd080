"""What main.py can do: one linear program each.

A task takes a config, the workdir, which all hosts share and where an
interrupted run goes on, and the first and last step to trace. It returns its
results, or None if the platform took the machine back. A config that does not
fit together is a UserError, before anything is compiled.
"""
