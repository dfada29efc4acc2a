"""The fixtures of runs: the real configuration made small, tiny data, and `run.py` as a process."""

from run_fixtures import *  # noqa: F403
