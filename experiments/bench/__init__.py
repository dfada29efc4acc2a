"""The benchmark of speed and memory, separate from accuracy runs: `python -m experiments.bench`."""

from sparsegrad import interrupt as interrupt  # first: Ctrl-C while torch is imported ends in one line
