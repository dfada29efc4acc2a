"""Which runs count: those with the same validation rows, and of several of one seed that of the search as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.report.blocks import describe_repeat
from experiments.report.resampling import shared_rows
from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import CURRENT, Searches


def settle_runs(block: Block, searches: Searches) -> None:
    """Choose from `found` the `runs` of each seed; the others are named first in `apart`: some need a remedy.

    A search that is made anew gives its arm another rate, so runs of the earlier rate do not mix with those of the new
    one. Two runs of one seed that both count contradict each other, so neither does. Runs are paired by row, so of the
    others those with other rows than most of their task do not count.
    """
    split = {key: _split_by_search(found, searches) for key, found in block.found.items()}
    earlier = [f"{arm} {task}: {one}" for (arm, task), (_, said) in split.items() for one in said]
    repeats, other = list[str](), _find_other_rows(run for counting, _ in split.values() for run in counting)
    for (arm, task), (counting, _) in split.items():
        if all(run.path in other for run in counting):
            continue
        by_seed: dict[int, list[EvidenceRun]] = {}
        for run in (run for run in counting if run.path not in other):
            by_seed.setdefault(run.seed, []).append(run)
        twice = {seed: same for seed, same in by_seed.items() if len(same) > 1}
        repeats += [f"{arm} {task} seed {seed}: {_name_repeats(same)}" for seed, same in twice.items()]
        if runs := {seed: same[0] for seed, same in by_seed.items() if len(same) == 1}:
            block.runs[arm, task] = runs
        else:
            repeats.append(f"{arm} {task}: no run counts")
    block.apart[:0] = [*repeats, *(f"{path}: {why}" for path, why in other.items()), *earlier]


def _find_other_rows(runs: Iterable[EvidenceRun]) -> dict[Path, str]:
    """Record -> why it does not count, for runs whose validation rows are not those of most runs of their task."""
    by_task: dict[str, dict[bytes, list[EvidenceRun]]] = {}
    for run in runs:
        rows = shared_rows(run.metric, run.arrays).astype(np.float64).tobytes()
        by_task.setdefault(run.task, {}).setdefault(rows, []).append(run)
    other = {}
    for groups in by_task.values():
        most = max(groups.values(), key=len)
        for run in (run for same in groups.values() if same is not most for run in same):
            other[run.path] = _describe_other_rows(run, len(most))
    return other


def _describe_other_rows(run: EvidenceRun, most: int) -> str:
    """Why a run does not count, and the remedy; a data folder that has changed gives its rows again."""
    others = f"{most} other run{'s' * (most > 1)}"
    return (
        f"its validation rows are not those of {others} on {run.task}: delete it; then "
        f"{describe_repeat(run.path.parts[0], run.seed)}. If the new one has the same rows as this, the data folder "
        "differs from that of the others"
    )


def _split_by_search(found: Sequence[EvidenceRun], searches: Searches) -> tuple[list[EvidenceRun], list[str]]:
    """The runs that count, and lines on those of an earlier search, if there are runs of the present one."""
    changes = [searches.describe_change(run) for run in found]
    is_renewed = CURRENT in changes
    earlier: dict[str, list[str]] = {}
    counting = []
    for run, change in zip(found, changes, strict=True):
        if is_renewed and change:
            earlier.setdefault(change, []).append(run.path.name)
        else:
            counting.append(run)
    return counting, [f"of an earlier search ({change}): {', '.join(names)}" for change, names in earlier.items()]


def _name_repeats(same: Sequence[EvidenceRun]) -> str:
    said = [f"{run.path.name}, rate {run.rate:g}, {run.finished or 'no date'}" for run in same]
    return f"{len(same)} records ({'; '.join(said)}): delete the wrong ones"
