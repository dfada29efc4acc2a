"""Check for memory leaks over hours of training: sample a process's memory, then fit a slope.

    python -m experiments.reliability.soak sample PID --out samples.csv            # until the process ends
    python -m experiments.reliability.soak plot samples.csv --about "what ran"     # soak.json and soak.png

The samples file has the columns `seconds` (while the process was not stopped), `rss_mib` and `note`. The slope is a
least-squares fit through the means of equally long stretches after a warm-up. Consecutive samples are strongly
correlated, so a fit through every sample would give a confidence interval that is far too narrow.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy import stats

from experiments.paths import ROOT
from sparsegrad.errors import UserError, check_number
from sparsegrad.files import write_json

COLUMNS = ("seconds", "rss_mib", "note")
STRETCHES = 24
MIB, HOUR = 2**20, 3600.0


@dataclass(frozen=True)
class Samples:
    """Samples: increasing seconds and memory in MiB, arrays of equal length, and (second, note) pairs."""

    seconds: np.ndarray[Any, Any]
    mib: np.ndarray[Any, Any]
    notes: list[tuple[float, str]]


def sample(pid: int, out: Path, interval: float) -> None:
    """Append the resident memory of a process, without its children, every `interval` seconds until it ends.

    Raises:
        UserError: when there is no such process.
    """
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        raise UserError(f"PID={pid} is no process of this machine: start the process to be sampled first") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.exists()
    # An existing file is continued at its last time.
    seconds, last = 0.0 if new else float(max(read_samples(out).seconds, default=0.0)), time.monotonic()
    with out.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        if new:
            rows.writerow(COLUMNS)
        while (memory := _resident(process)) is not None:
            now = time.monotonic()
            seconds += 0.0 if process.status() == psutil.STATUS_STOPPED else now - last
            last = now
            rows.writerow([f"{seconds:.1f}", f"{memory / MIB:.2f}", ""])
            file.flush()
            time.sleep(interval)


def _resident(process: psutil.Process) -> int | None:
    """Resident memory in bytes; None when the process has ended."""
    try:
        gone = process.status() == psutil.STATUS_ZOMBIE
        return None if gone else int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return None


def read_samples(path: Path) -> Samples:
    """Read a samples file; gaps in time are allowed.

    Raises:
        UserError: when the file is missing, has other columns, contains something that is not a number, or goes back in
            time.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ()) != COLUMNS:
                raise UserError(f"{path} has the columns {table.fieldnames}: give {','.join(COLUMNS)}")
            rows = [(float(row["seconds"]), float(row["rss_mib"]), row["note"] or "") for row in table]
    except (OSError, UnicodeDecodeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a readable file of samples ({error})") from None
    seconds, mib = (np.array([row[column] for row in rows]) for column in (0, 1))
    if not (np.isfinite(seconds).all() and np.isfinite(mib).all() and (np.diff(seconds) >= 0).all()):
        raise UserError(f"{path} has seconds or memory that are not finite, or seconds that go back: correct the file")
    return Samples(seconds, mib, [(second, note) for second, _, note in rows if note])


def report(samples: Samples, about: str, warm_up: float) -> dict[str, Any]:
    """Slope in MiB per hour after the first `warm_up` share of the time, its 95 % confidence interval, and a summary.

    Raises:
        UserError: for fewer than two samples per stretch after the warm-up.
    """
    check_number("warm_up", warm_up, at_least=0, below=1)
    begin = samples.seconds[0] + warm_up * np.ptp(samples.seconds) if len(samples.seconds) else 0.0
    kept = samples.seconds >= begin
    if kept.sum() < 2 * STRETCHES:
        raise UserError(f"{kept.sum()} samples after the warm-up are too few: {2 * STRETCHES} are needed")
    hours, mib = stretch_means(samples.seconds[kept] / HOUR, samples.mib[kept])
    fit = stats.linregress(hours, mib)
    half = float(stats.t.ppf(0.975, len(hours) - 2) * fit.stderr)
    return {
        "about": about,
        "hours": round(float(np.ptp(samples.seconds)) / HOUR, 4),
        "samples": len(samples.seconds),
        "longest_gap_seconds": round(float(np.diff(samples.seconds).max()), 1),
        "warm_up_share": warm_up,
        "stretches": len(hours),
        "slope_mib_per_hour": round(float(fit.slope), 4),
        "interval": [round(float(fit.slope) - half, 4), round(float(fit.slope) + half, 4)],
        "level": 0.95,
        "first_mib": round(float(mib[0]), 2),
        "last_mib": round(float(mib[-1]), 2),
        "peak_mib": round(float(samples.mib.max()), 2),
        "notes": [[round(second, 1), note] for second, note in samples.notes],
    }


def stretch_means(hours: np.ndarray[Any, Any], mib: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Means of time and memory over `STRETCHES` stretches of equal length; stretches without samples are omitted."""
    edges = np.linspace(hours[0], hours[-1], STRETCHES + 1)[1:-1]
    of = np.searchsorted(edges, hours, side="right")
    found = [of == stretch for stretch in np.unique(of)]
    return np.array([hours[here].mean() for here in found]), np.array([mib[here].mean() for here in found])


def draw(samples: Samples, facts: dict[str, Any], path: Path) -> None:
    """Plot every sample, the shaded warm-up, and the fitted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    hours = samples.seconds / HOUR
    begin = hours[0] + facts["warm_up_share"] * np.ptp(hours)
    axes.plot(hours, samples.mib, ".", markersize=2, color="tab:blue")
    axes.axvspan(hours[0], begin, color="0.92", label="warm-up, not fitted")
    means = stretch_means(hours[hours >= begin], samples.mib[hours >= begin])
    middle, slope = [float(mean.mean()) for mean in means], facts["slope_mib_per_hour"]
    ends = np.array([begin, hours[-1]])
    low, high = facts["interval"]
    label = f"{slope:+.2f} MiB/h (95 %: {low:+.2f} to {high:+.2f})"
    axes.plot(ends, middle[1] + slope * (ends - middle[0]), color="tab:red", label=label)
    axes.set(xlabel="hours", ylabel="resident memory, MiB", ylim=(0, 1.15 * samples.mib.max()))
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0, or 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reliability.soak", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    watch = commands.add_parser("sample", help="append the resident memory of a process to a file until it ends")
    watch.add_argument("pid", type=int)
    watch.add_argument("--out", type=Path, required=True)
    watch.add_argument("--interval", type=float, default=5.0, help="seconds between two samples")
    fit = commands.add_parser("plot", help="slope and plot of the samples")
    fit.add_argument("samples", type=Path)
    fit.add_argument("--about", required=True, help="what ran, and on what machine")
    fit.add_argument("--warm-up", type=float, default=0.2, help="share of the time that the fit leaves out")
    fit.add_argument("--out", type=Path, default=ROOT / "results/reliability", help="folder of soak.json and soak.png")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "sample":
            sample(chosen.pid, chosen.out, check_number("interval", chosen.interval, above=0, below=math.inf))
            return 0
        samples = read_samples(chosen.samples)
        facts = report(samples, chosen.about, chosen.warm_up)
        draw(samples, facts, chosen.out / "soak.png")
        write_json(chosen.out / "soak.json", facts)
        print(
            f"{facts['hours']} h, {facts['slope_mib_per_hour']:+} MiB/h {facts['interval']}, peak {facts['peak_mib']}"
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
