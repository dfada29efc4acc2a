"""The runs that each table needs, and a command that makes the missing ones: `python -m experiments.reproduce`."""
