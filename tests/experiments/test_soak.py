"""The soak test's fit: it finds a leak and its size, and none where there is none; bad files are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.reliability.page import BLOCKS, MISSING, PAGE, RESULTS, fill_blocks, fuzz_section, kills
from experiments.reliability.soak import COLUMNS, main, read_samples, report

LEAK = 3.0  # MiB per hour


def write(path: Path, leak: float = 0.0, gap: bool = True) -> Path:
    """Two hours, a sample every five seconds: a rise of 300 MiB in the first minutes, correlated noise, and a leak."""
    draw, seconds = np.random.default_rng(0), np.arange(0, 7200, 5.0)
    noise = np.convolve(draw.normal(size=len(seconds) + 59), np.ones(60) / 60, "valid")
    mib = 1000 + 300 * (1 - np.exp(-seconds / 200)) + leak * seconds / 3600 + noise
    rows = [f"{second},{size}," for second, size in zip(seconds, mib, strict=True)]
    if gap:
        rows[500:800] = [rows[500] + "stopped for a while"]
    path.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    return path


@pytest.mark.parametrize("gap", [False, True])
def test_a_leak_is_found_and_no_other(tmp_path: Path, gap: bool) -> None:
    leaking = report(read_samples(write(tmp_path / "leak.csv", LEAK, gap)), "a leak", 0.25)
    low, high = leaking["interval"]
    assert 0 < low < LEAK < high
    flat = report(read_samples(write(tmp_path / "flat.csv", 0.0, gap)), "none", 0.25)
    low, high = flat["interval"]
    assert low < 0 < high
    assert flat["peak_mib"] < 1310
    assert flat["longest_gap_seconds"] == (1500.0 if gap else 5.0)


def test_plot_writes_both_files(tmp_path: Path) -> None:
    arguments = ["plot", str(write(tmp_path / "samples.csv")), "--about", "a stand-in", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    facts = json.loads((tmp_path / "out" / "soak.json").read_text())
    assert facts["about"] == "a stand-in"
    assert facts["notes"] == [[2500.0, "stopped for a while"]]
    assert (tmp_path / "out" / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "has the columns"),
        ("seconds,rss_mib,note\n1,much,\n", "not a readable"),
        ("seconds,rss_mib,note\n2,1,\n1,1,\n", "go back"),
        ("seconds,rss_mib,note\n2,nan,\n", "not finite"),
        ("seconds,rss_mib,note\n1\n", "not a readable"),
        ("seconds,rss_mib,note\n", "too few"),
        ("seconds,rss_mib,note\n1,1,\n", "too few"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    assert main(["plot", str(path), "--about", "x", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_process_is_sampled_until_it_ends(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.6)"])
    assert main(["sample", str(process.pid), "--out", str(tmp_path / "s.csv"), "--interval", "0.05"]) == 0
    assert process.wait() == 0
    first = len(read_samples(tmp_path / "s.csv").seconds)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"]) as process:
        main(["sample", str(process.pid), "--out", str(tmp_path / "s.csv"), "--interval", "0.05"])
    samples = read_samples(tmp_path / "s.csv")
    assert len(samples.seconds) > first > 3  # the second call appends to the samples of the first
    assert samples.mib.max() < 1000


def test_no_process_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(2**22 + os.getpid()), "--out", str(tmp_path / "s.csv")]) == 2
    assert "is no process" in capsys.readouterr().err


def test_the_page_says_what_the_files_hold(tmp_path: Path) -> None:
    """The committed page matches the committed results; a new result changes only its block."""
    page = PAGE.read_text()
    assert fill_blocks(page, RESULTS) == page
    assert page.count("<!-- /") == len(BLOCKS)
    facts = report(read_samples(write(tmp_path / "s.csv", LEAK)), "A stand-in | here", 0.25)
    (tmp_path / "soak.json").write_text(json.dumps(facts))
    said = fill_blocks(page, tmp_path)
    assert f"A stand-in | here: {facts['hours']:.2f} hours" in said
    assert said.count(MISSING) == 2
    assert fill_blocks(said, tmp_path) == said
    row = {"method": "lora", "equal": False, **dict.fromkeys(("kills", "SIGKILL", "SIGTERM", "SIGINT"), 5)}
    row |= {"full disk": 4, "cut_checkpoints": 1, "records_compared": 2}
    assert "| lora | 5 | 5 | 5 | 5 | 4 | 1 | 2 | **no** |" in kills({"methods": [row]})
    counts = {"inputs": 2000, "refused": 1500, "accepted": 499, "defect": 1}
    text = fuzz_section({"seed": 3, "inputs": 2000, "defects": 1, "readers": {"bases": counts}})
    assert "| bases | 2,000 | 1,500 | 499 | 1 |" in text
    assert "2,000 inputs of seed 3, 1 defects." in text
