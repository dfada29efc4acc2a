"""Which runs a table needs, and making those that are missing: `python -m experiments.reproduce`."""
