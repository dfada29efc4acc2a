"""The comparison of PEFT methods: equal searches, seeds, health gates, one table."""

from sparsegrad import interrupt as interrupt  # first: Ctrl-C while torch is imported ends in one line
