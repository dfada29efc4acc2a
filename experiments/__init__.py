"""The paper's tables and figures: the runs and measurements that they need, and the report that shows them."""

from sparsegrad import interrupt as interrupt  # first: Ctrl-C while torch is imported ends in one line
