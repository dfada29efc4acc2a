"""The runs that each table needs, and a command that makes the missing ones: `python -m experiments.reproduce`."""

from sparsegrad import interrupt as interrupt  # first: Ctrl-C while torch is imported ends in one line
