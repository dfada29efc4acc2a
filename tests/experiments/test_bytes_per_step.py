"""Counting the bytes that a process sends."""

from __future__ import annotations

import pytest

from experiments.studies import bytes_per_step


@pytest.mark.parametrize("counts", [(10, 35), (10, 0)])
def test_no_process_goes_on_before_all_have_counted(monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int]) -> None:
    """Sockets that a process closes at its end take their counts with them, on both sides."""
    seen, left = [], list(counts)
    monkeypatch.setattr(bytes_per_step.dist, "barrier", lambda: seen.append("barrier"))
    monkeypatch.setattr(bytes_per_step, "sent_bytes", lambda: seen.append("count") or left.pop(0))
    if counts[1] < counts[0]:
        with pytest.raises(AssertionError, match="10 bytes"):
            bytes_per_step.count_sent(lambda: None)
    else:
        assert bytes_per_step.count_sent(lambda: seen.append("action")) == 25
        assert seen == ["barrier", "count", "action", "count", "barrier"]
