"""Fixtures of runs (the real configuration made small, tiny data, `run.py` as a process) and of the judge."""

from evidence_cases import cases  # noqa: F401
from judge_cases import folder, judge, own_prompts  # noqa: F401
from run_fixtures import *  # noqa: F403
