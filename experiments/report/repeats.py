"""Which run of a seed counts where an arm has several: that of the search as it is now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import CURRENT, Searches


def settle_runs(block: Block, searches: Searches) -> None:
    """Choose from `found` the `runs` of each seed; the others are named at the front of `apart`: some need a remedy.

    A search that is made anew gives its arm another rate, so runs of the earlier rate do not mix with those of the new
    one. Two runs of one seed that both count contradict each other, so neither does.
    """
    repeats, earlier = list[str](), list[str]()
    for (arm, task), found in block.found.items():
        counting, said = _split_by_search(found, searches)
        earlier += [f"{arm} {task}: {one}" for one in said]
        by_seed: dict[int, list[EvidenceRun]] = {}
        for run in counting:
            by_seed.setdefault(run.seed, []).append(run)
        twice = {seed: same for seed, same in by_seed.items() if len(same) > 1}
        repeats += [f"{arm} {task} seed {seed}: {_name_repeats(same)}" for seed, same in twice.items()]
        if runs := {seed: same[0] for seed, same in by_seed.items() if len(same) == 1}:
            block.runs[arm, task] = runs
        else:
            repeats.append(f"{arm} {task}: no run counts")
    block.apart[:0] = [*repeats, *earlier]


def _split_by_search(found: Sequence[EvidenceRun], searches: Searches) -> tuple[list[EvidenceRun], Iterator[str]]:
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
    return counting, (f"of an earlier search ({change}): {', '.join(names)}" for change, names in earlier.items())


def _name_repeats(same: Sequence[EvidenceRun]) -> str:
    said = [f"{run.path.name}, rate {run.rate:g}, {run.finished or 'no date'}" for run in same]
    return f"{len(same)} records ({'; '.join(said)}): delete the wrong ones"
