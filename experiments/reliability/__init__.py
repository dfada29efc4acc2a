"""Attempts to break it: kills, hostile files, hours of work, many records."""

from sparsegrad import interrupt as interrupt  # first: Ctrl-C while torch is imported ends in one line
