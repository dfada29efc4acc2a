"""Requests to a real judge server on loopback: retries, rate limit, key, and errors that end with one line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from judge_cases import TURNS, run, verdicts
from judge_server import Judge, Says
from run_fixtures import free_port

from experiments.mtbench import compute_scores
from experiments.mtbench.client import seconds_of

KEY = "sk-secret-0123456789"
pytestmark = pytest.mark.usefixtures("own_prompts")


@pytest.mark.parametrize(
    "bad",
    [
        Says("down", status=500),
        Says("wait", status=429, headers={"Retry-After": "0"}),
        Says(raw=b"<html>not json"),
        Says(raw=b'{"choices": []}'),
        Says(raw=b"[1]"),
        Says(raw=b'{"choices": [{"message": {"content": 7}}]}'),
        Says(seconds=1.0),
    ],
    ids=["500", "429", "html", "no choice", "list", "no text", "timeout"],
)
def test_trouble_that_passes_is_tried_again(folder: Path, judge: Judge, bad: Says) -> None:
    judge.script = [bad, bad]
    assert run(folder, judge.url, "--workers", "1", "--timeout", "0.4") == 0
    assert len(judge.asked) == TURNS + 2
    assert compute_scores(folder)[0].judged == TURNS


def test_retry_after_holds_all_workers(folder: Path, judge: Judge) -> None:
    judge.script = [Says("slow down", status=429, headers={"Retry-After": "1"})]
    assert run(folder, judge.url, "--workers", "1") == 0
    assert judge.times[1] - judge.times[0] >= 0.95


def test_retry_after_is_seconds_or_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < seconds_of(soon) <= 30
    assert [seconds_of(text) for text in ("12", "-3", None, "", "soon", "1e400")] == [12, 0, 0, 0, 0, 0]


def test_a_wait_of_hours_ends_with_one_line(folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    judge.otherwise = Says("quota", status=429, headers={"Retry-After": "7200"})
    assert run(folder, judge.url, "--workers", "1") == 2
    assert "asks to wait 7200 s" in capsys.readouterr().err
    assert len(judge.asked) == 1


def test_the_rate_limit_spaces_requests(folder: Path, judge: Judge) -> None:
    run(folder, judge.url, "--per-minute", "600", "--workers", "5")
    assert judge.times[-1] - judge.times[0] >= 0.38  # five requests, a tenth of a second apart


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_at_once_and_is_not_shown(
    folder: Path, judge: Judge, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge.otherwise = Says(f"wrong key {KEY}", status=status)
    assert run(folder, judge.url, "--key-env", "JUDGE_KEY", "--workers", "1") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "refuses the key" in captured.err
    assert KEY not in captured.err + captured.out
    assert len(judge.asked) == 1


def test_the_key_is_sent_and_never_stored(folder: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run(folder, judge.url)
    assert set(judge.keys) == {f"Bearer {KEY}"}
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert KEY.encode() not in written


def test_without_a_key_none_is_sent(folder: Path, judge: Judge) -> None:
    run(folder, judge.url)
    assert set(judge.keys) == {None}


def test_one_failing_question_does_not_stop_the_rest(
    folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.for_text = {"said x.0": Says("too long", status=400)}
    assert run(folder, judge.url) == 1
    assert "no verdict: question x, turn 1: status 400: too long" in capsys.readouterr().err
    (one,) = compute_scores(folder)
    assert (one.judged, one.unjudged) == (TURNS - 1, 1)
    judge.for_text = {}
    assert run(folder, judge.url) == 0
    assert len(judge.asked) == TURNS + 1


def test_an_unreachable_judge_ends_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, f"http://127.0.0.1:{free_port()}/v1", "--attempts", "2", "--workers", "1") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "failed 5 times in a row" in error
    assert "ConnectError" in error
    assert not verdicts(folder)


def test_a_wrong_address_ends_at_once(folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, judge.url.replace("/v1", "/v9"), "--workers", "1") == 2
    assert "check --base-url and --model" in capsys.readouterr().err
    assert len(judge.asked) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--price-in", "1"), "both --price-in and --price-out"),
        (("--base-url", "localhost:80/v1"), "base_url=localhost:80/v1 is not allowed"),
        (("--base-url", "http://u:p@h/v1"), "must hold no user"),
        (("--per-minute", "0"), "per_minute=0.0 is not allowed"),
        (("--workers", "0"), "workers=0 is not allowed"),
        (("--attempts", "0"), "attempts=0 is not allowed"),
        (("--timeout", "nan"), "timeout=nan is not allowed"),
        (("--answers", "nowhere.jsonl"), "answers file nowhere.jsonl does not exist"),
    ],
)
def test_bad_options_end_with_one_line(
    folder: Path, judge: Judge, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, judge.url, *more) == 2
    assert message in capsys.readouterr().err
    assert not judge.asked
