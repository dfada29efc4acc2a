"""Peak memory sees what is made and freed within the phase, and nothing from before it."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from quick_python import quick_python

from sparsegrad.cli.running import KEPT_PRODUCTS
from sparsegrad.precision import has_bfloat16_products
from sparsegrad.trainer import peak_memory as memory
from sparsegrad.trainer.peak_memory import PeakMemory

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


@pytest.mark.parametrize("exact", [True, False])
def test_without_a_phase_that_has_ended_there_is_no_peak(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: exact)
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    assert "resident_mib" not in peak.report()


def test_the_largest_peak_above_its_own_baseline_counts_of_several_processes() -> None:
    own, above = PeakMemory(torch.device("cpu")), {"device": "cpu", "baseline_mib": 10.0, "method": "samples"}
    own.baseline = 500.0
    earlier = {**above, "resident_mib": 110.0}
    own.restore(earlier)
    assert own.report() == earlier, "this process has measured nothing"
    own.peak = {"resident_mib": 590.0}
    assert own.report() == earlier
    own.peak = {"resident_mib": 620.0}
    assert own.report() | {"method": ""} == {**above, "baseline_mib": 500.0, "resident_mib": 620.0, "method": ""}
    own.restore({"device": "cuda", "allocated_mib": 9000.0, "reserved_mib": 9500.0})
    assert own.report()["resident_mib"] == 620.0, "peaks of different devices are not compared"


# Prints the MiB that malloc holds more after products of 150 lengths than after 50, under autocast.
GROWTH = """
import ctypes, sys, torch
from sparsegrad.cli.running import cap_product_caches

class Held(ctypes.Structure):
    _fields_ = [(str(place), ctypes.c_size_t) for place in range(10)]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Held
if sys.argv[1] == "capped":
    cap_product_caches()
linear = torch.nn.Linear(384, 1536)
held = []
for tokens in range(8, 1201, 8):
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.ones(tokens, 384, requires_grad=True)).sum().backward()
    held.append(getattr(mallinfo(), "7") / 2**20)
print(held[-1] - held[49])
"""


def growth(how: str) -> float:
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    ran = subprocess.run(
        [quick_python(), "-c", GROWTH, how], env=environment, capture_output=True, text=True, check=False
    )
    if "mallinfo2" in ran.stderr:
        pytest.skip("this C library does not tell what malloc holds")
    assert ran.returncode == 0, ran.stderr
    return float(ran.stdout)


def test_products_of_ever_new_lengths_do_not_grow_the_memory_of_a_run() -> None:
    """One that is not capped shows that this test would see it."""
    if not has_bfloat16_products(torch.device("cpu")):
        pytest.skip("oneDNN has no products in bfloat16 for this processor, which torch would compute one by one")
    free = growth("free")
    if free < 25:
        pytest.skip(f"products of this machine are not cached: {free:.0f} MiB more without a cap")
    assert growth("capped") < 12, f"{KEPT_PRODUCTS} products of each cache are kept"
