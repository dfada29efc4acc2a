"""The dashboard on a study of ours: over HTTP, and as a browser shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_fixtures import FAKE_SWEEP, Composer, free_port, last_wins

from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.storage import dashboard_address

# No network but the page itself, no sandbox (which root cannot have), nothing that asks.
BROWSER = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1250",
    "--virtual-time-budget=20000",
)


@pytest.fixture(scope="module")
def address(conf: Composer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard, started as `make dashboard` does, on a study of six trials."""
    program = Path(sys.executable).with_name("optuna-dashboard")
    if not program.exists():
        pytest.skip("optuna-dashboard is not installed (pip install -e '.[sweep]')")
    folder, port = tmp_path_factory.mktemp("dashboard"), free_port()
    places = f"results_dir={folder}", f"work_dir={folder}/work", "sweep.study=shown", "sweep.trials=6"
    composed = conf(*last_wins(*FAKE_SWEEP, *places))
    run_sweep(composed)
    command = [program, dashboard_address(make_plan(composed).sweep.storage), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_the_dashboard_answers(address: str) -> None:
    assert "<html" in _get(f"{address}/dashboard")
    assert "shown" in json.dumps(json.loads(_get(f"{address}/api/studies")))


def test_a_browser_shows_the_study_and_its_plots(address: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    _get(f"{address}/dashboard")
    browse = [chromium, *BROWSER, f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    page = subprocess.run(
        [*browse, f"{address}/dashboard/studies/1"], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert "shown (id=1)" in page
    for heading in ("History", "Hyperparameter Importance", "Timeline", "Intermediate values", "Best Trial"):
        assert f">{heading}" in page, f"the page has no {heading}"
    assert page.count('class="main-svg"') >= 4, "plots were not drawn"
    assert "train.lr" in page
    assert "trial #5" in page


def _get(where: str) -> str:
    end = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(where, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            assert time.monotonic() < end, "the dashboard does not answer"
            time.sleep(0.2)
