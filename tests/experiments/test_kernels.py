"""`experiments.studies.kernels`, rehearsed on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.studies import kernels


def test_the_longest_operators_of_each_arm_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    kernels.main(
        ["--device", "cpu", "--shape", "tiny", "--precision", "fp32", "--arms", "full", "exact", "--out", str(out)]
    )
    arms = json.loads(out.read_text())["arms"]
    assert [arm["arm"] for arm in arms] == ["full", "exact"]
    for arm in arms:
        times = [kernel["milliseconds"] for kernel in arm["kernels"]]
        assert times == sorted(times, reverse=True)
        assert arm["milliseconds"] >= sum(times) - 0.1
