"""Complete records that are made again: all of them with `force=true`, else those that no table counts.

A table leaves out a record whose plan was edited afterwards, or whose predictions are missing. The key of a run has no
part in either, so the record would look finished for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.report.departures import find_departures
from experiments.report.evidence import judge_record
from experiments.report.plans import Plan
from experiments.report.runs import EvidenceRun
from experiments.reproduce.cells import Cell
from experiments.reproduce.costs import Estimates, facts_of

_SHOWN = 5  # reasons that are listed one by one


class Watch:
    """Which cells are made. With `force`, an earlier record does not count: it must be replaced after `Watch()`."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._before = {cell.config.record_path: _stamp(cell) for cell in cells if cell.config.force}

    def is_made(self, cell: Cell) -> bool:
        """Whether the cell has a complete record, by this process or another."""
        path = cell.config.record_path
        return cell.is_complete and (path not in self._before or _stamp(cell) != self._before[path])


def _stamp(cell: Cell) -> tuple[int, int] | None:
    """What changes when a record is replaced; a record is a new file each time."""
    try:
        found = cell.config.record_path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def force_uncounted(cells: Sequence[Cell], plan: Plan | None) -> list[Cell]:
    """The cells, with `force` where a complete record does not count; prints how many are made again, and why.

    Args:
        cells: those of one experiment.
        plan: by which their table judges; None: only `force=true` makes records again.
    """
    forced, reasons = list[Cell](), list[tuple[Cell, str]]()
    for cell in cells:
        reason = _explain_remaking(cell, plan)
        forced.append(cell.with_force() if reason and not cell.config.force else cell)
        reasons += [(cell, reason)] if reason else []
    if reasons:
        _announce(reasons)
    return forced


def _explain_remaking(cell: Cell, plan: Plan | None) -> str:
    """Why a complete record is to be made again; empty without a record, and if it stays.

    A record that would depart from the plan again, because of overrides or of the plan itself, stays: without this
    condition, every call would repeat it.
    """
    record, config = cell.record(), cell.config
    if record is None or record["status"] != "complete":
        return ""
    if config.force:
        return "force=true"
    if plan is None or config.name != plan.folder:  # no table judges records of this folder
        return ""
    place = Path(config.name) / config.record_path.name
    found = judge_record(Path(config.results_dir), plan, {plan.experiment: plan}, place, record)
    if isinstance(found, EvidenceRun) or plan.exploratory:
        return ""
    anew = {**record, "config": config.resolved, "hparams": cell.hparams}
    return "" if find_departures(anew, plan) else found


def _announce(reasons: Sequence[tuple[Cell, str]]) -> None:
    first = reasons[0][0]
    estimates = Estimates(Path(first.config.results_dir) / "runs")
    hours = [estimates.of(facts_of(cell.config.resolved))[0] for cell, _ in reasons]
    cost = f"about {sum(one for one in hours if one is not None):.1f} hours, one run at a time"
    print(f"{first.experiment}: {len(reasons)} complete records are made again, {cost}:", flush=True)
    counts = Counter(reason for _, reason in reasons).most_common()
    for reason, count in counts[:_SHOWN]:
        print(f"  {count}: {reason}", flush=True)
    if (more := sum(count for _, count in counts[_SHOWN:])) > 0:
        print(f"  {more}: similar reasons", flush=True)
