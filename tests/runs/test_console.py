"""A console without Unicode: every command runs, and shows what it cannot print as escapes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from quick_python import quick_python
from run_fixtures import ROOT, environment

# The last is a console without Unicode on which Python takes file names and files for ASCII too.
ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def start(*command: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """A command of the project in a process of its own, its output as bytes."""
    python = sys.executable if "LC_ALL" in env else quick_python()  # which has its locale already
    there = environment(PYTHONPATH=str(ROOT), **env)
    return subprocess.run([python, *command], cwd=folder, env=there, capture_output=True, check=False)


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_console_without_unicode_shows_escapes(name: str, tmp_path: Path) -> None:
    """A path with an accent in a configuration and in an error; a model's name with one in a table of records."""
    folder = tmp_path / "caf\xe9"
    folder.mkdir()
    if name != "C":  # errors are printed as tables are, but this one costs the import of transformers
        done = start(str(ROOT / "run.py"), f"data.dir='{folder}'", "task=sst2", folder=tmp_path, **ENCODINGS[name])
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
        assert done.stderr.startswith(b"error: data.dir=")
    records = Path(shutil.copytree(ROOT / "results" / "runs" / "quickstart", tmp_path / "records"))
    for record in records.glob("*.json"):
        content = json.loads(record.read_text(encoding="utf-8"))
        content["config"]["model"]["name"] = "mod\xe8le"
        record.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    shown = start("-m", "sparsegrad.cli", "records", str(records), folder=tmp_path, **ENCODINGS[name])
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert ("mod\xe8le".encode() if name == "C" else b"mod\\xe8le") in shown.stdout


def test_the_report_is_printed_on_a_console_without_unicode(tmp_path: Path) -> None:
    command = ("-m", "experiments.report", "figure1", "--results-dir", str(tmp_path / "caf\xe9"))
    done = start(*command, folder=ROOT, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"caf\\xe9" in done.stdout
