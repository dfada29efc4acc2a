"""Records on disk as cells of tables: values by seed, and problems of records."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.report.departures import find_departures
from experiments.report.plans import EvidencePlan, read_plan
from sparsegrad.errors import UserError, first_line
from sparsegrad.files import read_json
from sparsegrad.runs.environment import has_changed_code, list_processes
from sparsegrad.runs.records import PRUNED, SCHEMA, run_seconds

# Folders that tables read. In others, such as those of sweeps, records of one seed differ by design.
READ = re.compile(r"(glue|ablation)_.*|table6.*")

# Folder of a table of the paper -> the experiment that makes its runs. Other records in it do not count.
EXPERIMENTS = {
    "glue_roberta_large": "table4",
    "glue_bert_base": "table9",
    "glue_roberta_base": "table10",
    "ablation_bert_base": "table11",
    "ablation_roberta_base": "table12",
}
# A run of protocol `both` has the values of two protocols, so it differs from each of them in these.
OF_BOTH = ("protocol.select=", "protocol.watch_validation=")

Key = tuple[str, str, str, str, str]
"""(folder, model, method, task, protocol); in an ablation the method includes its kept entries: `sparsegrad@18000`."""


@dataclass(frozen=True)
class Run:
    """The facts of one record that tables use.

    Attributes:
        path: of the record, below results/runs.
        seed: of the run.
        value: in points (0 to 100); None for a failed run.
        hours: wall-clock hours.
        reason: why it failed.
        departures: what differs from the experiment of its folder; empty if nothing does, or if it has none.
    """

    path: Path
    seed: int
    value: float | None
    hours: float | None
    reason: str
    departures: tuple[str, ...] = ()


@dataclass
class Store:
    """All records below a folder.

    Attributes:
        runs: cell -> its runs.
        skipped: one line for each record that was not used.
        records: path -> record.
    """

    runs: dict[Key, list[Run]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    records: dict[Path, dict[str, Any]] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict, compare=False)  # what is computed once from these records

    def counting(self, key: Key) -> list[Run]:
        """The runs of a cell that follow its experiment."""
        return [run for run in self.runs.get(key, []) if not run.departures]

    def apart(self, folder: str) -> list[str]:
        """One line for each complete record of a folder that does not follow its experiment, with what differs."""
        runs = {run.path: run for key, of in self.runs.items() if key[0] == folder for run in of}
        return [
            f"{path}: not as experiment={EXPERIMENTS[folder]} says: {', '.join(run.departures)}"
            for path, run in sorted(runs.items())
            if run.departures and run.value is not None
        ]

    def values(self, key: Key) -> list[float]:
        """The scores of a cell in order of seeds; seeds whose records disagree are left out."""
        return [value for _, value in sorted(self.by_seed(key).items())]

    def by_seed(self, key: Key) -> dict[int, float]:
        """Seed -> score; seeds whose records disagree are left out."""
        found: dict[int, set[float]] = {}
        for run in self.counting(key):
            if run.value is not None:
                found.setdefault(run.seed, set()).add(run.value)
        return {seed: values.pop() for seed, values in found.items() if len(values) == 1}

    def disagreements(self) -> Iterator[str]:
        """One line for each cell and seed that has more than one score."""
        for key in sorted(key for key in self.runs if READ.fullmatch(key[0])):
            runs = self.counting(key)
            for seed in sorted({run.seed for run in runs}):
                of = [run for run in runs if run.seed == seed and run.value is not None]
                if len({run.value for run in of}) > 1:
                    names = ", ".join(f"{run.path.name} {run.value:.2f}" for run in of)
                    yield f"{'/'.join(key)} seed {seed}: records disagree ({names}): delete the wrong ones"

    def failures(self, key: Key) -> list[str]:
        """Reasons of seeds that have only failed runs."""
        good = self.by_seed(key)
        return [f"seed {run.seed}: {run.reason}" for run in self.counting(key) if _failed(run, good)]

    def cost(self, key: Key) -> float | None:
        """Total hours of the successful runs of a cell; None without any."""
        spent = [run.hours for run in self.counting(key) if run.hours is not None and run.value is not None]
        return sum(spent) if spent else None


def _failed(run: Run, good: dict[int, float]) -> bool:
    return run.value is None and run.seed not in good and not run.reason.startswith(PRUNED)


def collect_cells(runs: Path) -> Store:
    """Read all records below `runs`; records that are damaged or of another schema are listed in `skipped`."""
    store = Store()
    plans = {folder: read_plan(name) for folder, name in EXPERIMENTS.items() if (runs / folder).is_dir()}
    for path in sorted(runs.rglob("*.json")):
        place = path.relative_to(runs)
        try:
            record = read_json(path)
            if not isinstance(record, dict) or record.get("schema") != SCHEMA:
                found = record.get("schema") if isinstance(record, dict) else type(record).__name__
                store.skipped.append(f"{place}: record schema {found}, this version reads {SCHEMA}")
                continue
            _check_result(record)
            found_runs = dict(_runs(place, record, plans.get(place.parts[0])))  # complete before the store changes
        except UserError as error:
            store.skipped.append(f"{place}: not a readable record ({error})")
            continue
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            store.skipped.append(f"{place}: not a readable record ({type(error).__name__}: {first_line(error)})")
            continue
        for key, run in found_runs.items():
            store.runs.setdefault(key, []).append(run)
        store.records[place] = record
    return store


def _check_result(record: dict[str, Any]) -> None:
    """A complete record has a score; that of a run that diverged is null."""
    if record["status"] == "complete" and "value" not in record.get("result", {}):
        raise UserError("it is complete without result.value")


def _runs(place: Path, record: dict[str, Any], plan: EvidencePlan | None) -> Iterator[tuple[Key, Run]]:
    """(key, run) for the record's protocol; a record of protocol `both` has the values of two protocols."""
    config, result = record["config"], record.get("result", {})
    method, protocol = _variant(place.parts[0], config["method"]), config["protocol"]["name"]
    other = () if plan is None else tuple(find_departures(record, plan))
    values = {protocol: result.get("value")}
    if protocol == "both":
        values = {"heldout": result.get("value"), "paper": result.get("best_on_validation", {}).get("value")}
        other = tuple(one for one in other if not one.startswith(OF_BOTH))
    for name, value in values.items():
        is_scored = record["status"] == "complete" and value is not None  # the score of a run that diverged is null
        points = round(100 * float(value), 6) if is_scored else None
        key = (place.parts[0], config["model"]["name"], method, config["task"]["name"], name)
        yield key, Run(place, int(config["seed"]), points, hours(record), str(record.get("reason", "")), other)


def _variant(folder: str, method: dict[str, Any]) -> str:
    """The method's name in a key; in the ablation, with the number of kept entries."""
    if folder.startswith("ablation"):
        return f"{method['name']}@{method['keep']}"
    return str(method["name"])


def skipped_summary(store: Store) -> str:
    """Number of skipped records by reason, in one line; empty if there are none."""
    if not store.skipped:
        return ""
    kinds = Counter("another schema" if "record schema" in line else "damaged" for line in store.skipped)
    return f"{len(store.skipped)} records skipped: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


def commit_of(record: Mapping[str, Any]) -> str:
    """Short form of the commits that made a record, marked if files had been changed; empty if it names none."""
    environment = record.get("environment", {})
    gits = [one.get("git") or {} for one in list_processes(environment)]
    commits = dict.fromkeys(git["commit"][:7] for git in gits if git.get("commit"))
    changes = " with changes" if commits and has_changed_code(environment) else ""
    return f"{' then '.join(commits)}{changes}"


def hours(record: Mapping[str, Any]) -> float | None:
    """Wall-clock hours of one run; None if the record has no times."""
    seconds = run_seconds(record)
    return None if seconds is None else seconds / 3600
