"""Peak memory sees what is made and freed within the phase, and nothing from before it."""

from __future__ import annotations

import pytest
import torch

from sparsegrad import memory
from sparsegrad.memory import PeakMemory

MIB = 2**20


def take(mib: int) -> None:
    """Allocate, touch and free."""
    torch.ones(mib * MIB, dtype=torch.uint8)


def test_a_peak_inside_the_phase_is_seen_and_one_before_is_not() -> None:
    peak = PeakMemory(torch.device("cpu"))
    if not memory._reset_high_water_mark():
        pytest.skip("this kernel does not reset the high-water mark")
    take(400)
    peak.start()
    take(200)
    peak.stop()
    report = peak.report()
    assert report["method"] == "VmHWM"
    assert 190 < report["resident_mib"] - report["baseline_mib"] < 350


def test_the_largest_of_several_phases_counts_and_what_is_between_does_not() -> None:
    peak = PeakMemory(torch.device("cpu"))
    if not memory._reset_high_water_mark():
        pytest.skip("this kernel does not reset the high-water mark")
    for inside in (50, 200, 10):
        peak.start()
        take(inside)
        peak.stop()
        take(400)
    report = peak.report()
    assert 190 < report["resident_mib"] - report["baseline_mib"] < 350


def test_without_a_high_water_mark_samples_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    held = torch.ones(100 * MIB, dtype=torch.uint8)
    peak.sample()
    del held
    peak.stop()
    report = peak.report()
    assert report["method"] == "samples"
    assert report["resident_mib"] - report["baseline_mib"] > 90
