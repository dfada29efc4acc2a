"""When a run is stopped early: after evaluations in a row that are no better, counted from a given step on."""

from __future__ import annotations

import re

import pytest
from run_fixtures import Tiny
from test_runs import Stop, curves

from sparsegrad.errors import UserError
from sparsegrad.runs import announcement
from sparsegrad.runs.announcement import _describe_steps
from sparsegrad.runs.runner import run

# A rate that changes no prediction: every evaluation has the same score.
FLAT = ("train.lr=1e-9", "protocol.max_steps=8", "protocol.eval_steps=1", "protocol.patience=2")


def evaluated(record: dict) -> list[int]:
    return [one["step"] for one in record["evaluations"]]


@pytest.mark.parametrize(("start", "last"), [(0, 3), (5, 6), (9, 8)])
def test_patience_counts_from_a_step_on(tiny: Tiny, start: int, last: int) -> None:
    """The first evaluation is the best one so far, whatever its score; from step 5 on, two more end the run."""
    record, _ = run(tiny(*FLAT, f"protocol.patience_from={start}"))
    assert evaluated(record) == list(range(1, last + 1))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "at most 8 .*; stops after 2 evaluations in a row without improvement$"),
        (("protocol.patience=1", "protocol.patience_from=5"), "after 1 evaluation without .*, counted from step 5 on$"),
        (("protocol.patience=null",), "^8 of [^;]*$"),
        (("protocol.patience=7",), "^8 of [^;]*$"),  # only at the last evaluation, where the run ends anyway
        (("protocol.max_steps=1",), "^1 of .* rows, 1 evaluation$"),
    ],
)
def test_the_header_of_a_run_says_when_it_stops(tiny: Tiny, overrides: tuple[str, ...], said: str) -> None:
    assert re.search(said, _describe_steps(tiny(*FLAT, *overrides), rows=64))


def test_a_resumed_run_goes_on_counting(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(announcement, "remark", said.append)
    config = tiny(*FLAT, "protocol.patience_from=4")
    whole, _ = run(config)
    config.record_path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(4)])
    again = Stop()
    resumed, _ = run(config, callbacks=[again], announces=True)
    assert again.began in (3, 4)
    assert any(line.endswith(f"; continues after step {again.began}") for line in said)
    assert evaluated(resumed) == evaluated(whole) == [1, 2, 3, 4, 5]
    assert curves(resumed) == curves(whole)


def test_a_start_has_no_effect_without_patience_and_is_no_negative_step(tiny: Tiny) -> None:
    """A plan sets it, and a sweep on top of the plan may turn patience off."""
    record, _ = run(tiny(*FLAT, "protocol.patience=null", "protocol.patience_from=5"))
    assert evaluated(record) == list(range(1, 9))
    with pytest.raises(UserError, match=r"protocol\.patience_from=-1 "):
        tiny("protocol.patience_from=-1")
