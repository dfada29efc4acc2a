"""The benchmark of speed and memory, separate from accuracy runs: `python -m experiments.bench`."""
