"""Tables, figures and the report page, made from records: `python -m experiments.report`. Nothing is run."""

from sparsegrad import interrupt as interrupt  # first: Ctrl-C while torch is imported ends in one line
