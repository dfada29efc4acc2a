"""Complete records that are made again: all of them with `force=true`, else those without their predictions.

A table leaves out a record whose predictions are missing or damaged. The key of a run does not depend on them, so
without this module the record would count as finished. It is set aside when its run starts: with `force=true`, the run
would begin anew after each stop. Records of a plan that was edited afterwards are named, but made again only with
`force=true`: they can be hours of runs that are valid again when the edit is undone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from experiments.report.departures import find_departures
from experiments.report.evidence import LEFT_OUT, judge_record
from experiments.report.plans import EvidencePlan
from experiments.report.runs import EvidenceRun
from experiments.reproduce.cells import Cell, stamp
from experiments.reproduce.costs import Estimates, facts_of
from sparsegrad.files import unwritable

ASIDE = ".aside"  # ends the name of a record that was set aside
_SHOWN = 5  # reasons that are listed one by one


class Watch:
    """Which cells are made. An uncounted record must be replaced, and with `force` the one at the time of `Watch()`."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        paths = {cell.config.record_path: cell for cell in cells if cell.is_again}
        self._before = {path: stamp(path) if cell.config.force else cell.uncounted for path, cell in paths.items()}

    def is_made(self, cell: Cell) -> bool:
        """Whether the cell has a complete record, by this process or another."""
        path = cell.config.record_path
        return cell.is_complete and (path not in self._before or stamp(path) != self._before[path])


def set_aside(cell: Cell) -> None:
    """Rename the record of a cell if it is the uncounted one, so that the run of the cell does not find it."""
    path = cell.config.record_path
    if cell.uncounted is None or stamp(path) != cell.uncounted:
        return
    try:
        with suppress(FileNotFoundError):  # another call was faster
            path.replace(_aside(path))
    except OSError as error:
        raise unwritable(path, error) from None


def drop_aside(cell: Cell) -> None:
    """Delete the record that was set aside, once the cell has another."""
    _aside(cell.config.record_path).unlink(missing_ok=True)


def _aside(record: Path) -> Path:
    return record.with_name(record.name + ASIDE)


def mark_uncounted(cells: Sequence[Cell], plan: EvidencePlan | None) -> list[Cell]:
    """The cells, with `uncounted` where a complete record does not count; prints how many are made again, and why.

    Args:
        cells: those of one experiment.
        plan: by which their table judges; None: only `force=true` makes records again.
    """
    marked, again, uncounted = list[Cell](), list[tuple[Cell, str]](), Counter[str]()
    for cell in cells:
        judged = stamp(cell.config.record_path)  # before: another call may replace the record meanwhile
        remade, left_out = _explain(cell, plan)
        marked.append(replace(cell, uncounted=judged) if remade and not cell.config.force else cell)
        again += [(cell, remade)] if remade else []
        uncounted.update([left_out] if left_out else [])
    if again:
        _announce(again)
    if uncounted:
        _list_reasons(f"{cells[0].experiment}: runs that will not count in the table", uncounted)
    return marked


def _explain(cell: Cell, plan: EvidencePlan | None) -> tuple[str, str]:
    """Why the complete record of a cell is made again, and why the table will not count the cell; or empty."""
    if cell.waits is not None:  # its rate is not known yet
        return "", ""
    record = cell.record()
    is_complete = record is not None and record["status"] == "complete"
    remade = "force=true" if is_complete and cell.config.force else ""
    if plan is None or cell.config.name != plan.folder:  # no table judges this folder
        return remade, ""
    if remade or not is_complete:
        anew = {"config": cell.config.resolved, "hparams": cell.hparams}
        other = [] if plan.exploratory else find_departures(anew, plan)
        return remade, f"not as its plan says: {', '.join(other)}" if other else ""
    found = _judge(cell, plan)
    if found.startswith(LEFT_OUT):
        return found, ""
    return "", f"{found}; ARGS=force=true makes all runs of the block again" if found and not plan.exploratory else ""


def _judge(cell: Cell, plan: EvidencePlan) -> str:
    """Why the table leaves out the complete record of a cell; empty if it counts."""
    record, config = cell.record(), cell.config
    assert record is not None
    place = Path(config.name) / config.record_path.name
    found = judge_record(Path(config.results_dir), plan, {plan.experiment: plan}, place, record)
    return "" if isinstance(found, EvidenceRun) else found


def _announce(reasons: Sequence[tuple[Cell, str]]) -> None:
    first = reasons[0][0]
    estimates = Estimates(Path(first.config.results_dir) / "runs")
    hours = [estimates.of(facts_of(cell.config.resolved))[0] for cell, _ in reasons]
    cost = f"about {sum(one for one in hours if one is not None):.1f} hours, one run at a time"
    _list_reasons(
        f"{first.experiment}: complete records that are made again ({cost})", Counter(reason for _, reason in reasons)
    )
    if not first.config.force:
        print(f"  each keeps its name with {ASIDE} at the end until the new one is complete", flush=True)


def _list_reasons(title: str, reasons: Counter[str]) -> None:
    print(f"{title}: {reasons.total()}", flush=True)
    counts = reasons.most_common()
    for reason, count in counts[:_SHOWN]:
        print(f"  {count}: {reason}", flush=True)
    if (more := sum(count for _, count in counts[_SHOWN:])) > 0:
        print(f"  {more}: similar reasons", flush=True)
