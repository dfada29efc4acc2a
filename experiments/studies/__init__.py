"""Measurements beside the runs of the tables and the benchmark. Each is a command and writes one JSON.

`gradients`, with `probe` and `captured`, measures the data of figures 2 and 3, of the basis study and of the energy
table; `make reproduce-figure2` and its like call it. The others back single statements of the docs and were run once.
"""

from sparsegrad import interrupt as interrupt  # first: Ctrl-C while torch is imported ends in one line
