"""The fixtures of runs: the real configuration made small, tiny data, `run.py` as a process, a hub on loopback."""

from hub_fixtures import hub, hub_run, site  # noqa: F401
from run_fixtures import *  # noqa: F403
