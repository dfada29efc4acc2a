"""A run that must be refused: the one line that it prints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from run_fixtures import Composer, last_wins

from sparsegrad import cli

Refused = Callable[..., str]


@pytest.fixture
def refused(conf: Composer, small: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused(*overrides)`: run what run.py runs; the one line it prints on stderr, after status 2."""

    def run(*overrides: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run_command(conf(*last_wins(*small, *overrides)))
        assert ended.value.code == 2
        return error_line(capsys.readouterr().err)

    return run


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error must come before a model is loaded."""
    monkeypatch.setattr("sparsegrad.runs.parts.load_model", lambda *_: pytest.fail("a model was loaded"))


def error_line(stderr: str) -> str:
    """The one `error:` line, which ends the output; bars may have come before it."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert "Traceback" not in stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]
