"""Make the runs of the evidence plans: `python -m experiments.reproduce.evidence 2a --data <glue folder>`.

A block is a plan of conf/experiment (experiments/report/blocks.py has their order); `all` makes them one after the
other. Every cell is a process of its own with one thread. Cells with a complete record are not repeated, so the same
command continues after a kill, and several calls share the work. A complete record without its predictions is made
again, as all are with force=true. The records go to results/, with the plan's hash.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.report.blocks import Step
from experiments.reproduce import commands, dry_run, search_all
from experiments.reproduce.cells import Cell, in_evidence, list_with_waiting
from experiments.reproduce.commands import last_wins
from experiments.reproduce.costs import RECORDS, Estimates, facts_of
from experiments.reproduce.counting import Watch, force_uncounted
from experiments.reproduce.places import check_places, find_lack, refuse
from experiments.reproduce.plans import list_blocks, read_plan
from experiments.reproduce.processes import (
    EndedJob,
    Job,
    cell_job,
    explain_end,
    is_held,
    lacks_hub,
    last_error,
    run_jobs,
)
from experiments.reproduce.waiting import settle_waiting
from sparsegrad import progress
from sparsegrad.errors import UserError, check_integer
from sparsegrad.runs.overrides import key_of

POLL_SECONDS = 5.0
_BUSY = "is at work in another process"  # part of the message of `BusyError`, which a run prints in its own process


@dataclass(frozen=True, kw_only=True)
class Request:
    """Where the data is, the number of processes, further overrides of run.py, and whether to list only."""

    data: str | None
    trees: str | None
    workers: int
    overrides: tuple[str, ...]
    dry: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 if all cells are complete, 1 if some failed, 2 after bad input, 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    request = Request(
        data=options.data,
        trees=options.trees,
        workers=options.workers,
        overrides=tuple(in_evidence(options.overrides)),
        dry=options.dry,
    )
    return commands.run(lambda: _make_blocks(options.block, request), options.overrides)


def _make_blocks(name: str, request: Request) -> int:
    check_integer("WORKERS", request.workers, at_least=1)
    check_places(request.data, request.trees, dry=request.dry)
    return max(_make_block(block, request, is_only=name != "all") for block in list_blocks(name))


def _make_block(block: Step, request: Request, *, is_only: bool) -> int:
    print(f"block {block.name}: {', '.join(block.plans) or 'searches'}", flush=True)
    if block.takes_trees and request.trees is None:
        reason = f"block {block.name} needs TREES=<file of conversation trees>"
        if is_only:
            raise UserError(reason)
        print(f"left out: {reason}", flush=True)
        return 0
    if not block.plans:
        overrides = tuple(one for one in last_wins(request.overrides) if key_of(one) != "seed")  # of runs, not searches
        wanted = search_all.Request(data=request.data, trees=request.trees, overrides=overrides)
        return search_all.make(search_all.plan_searches(wanted), request.workers, dry=request.dry)
    return max(_make_plan(name, block, request) for name in block.plans)


def _make_plan(name: str, block: Step, request: Request) -> int:
    overrides = last_wins((*block.overrides, *request.overrides))
    cells = plan_cells(name, overrides, request.trees if block.takes_trees else request.data, dry=request.dry)
    cells = force_uncounted(cells, read_plan(name))
    if request.dry:
        dry_run.show(cells)
        return 0
    return make(cells, request.workers)


def plan_cells(name: str, overrides: Sequence[str], data: str | None, *, dry: bool) -> list[Cell]:
    """The cells of an experiment, if what they need is there; those of a listing may lack data or searches.

    Raises:
        UserError: for a value that is not allowed; without `dry`, also for missing data or searches.
    """
    cells = list_with_waiting(name, overrides, data)
    check_data(cells, dry=dry)
    settle_waiting(cells, data, dry=dry)
    return cells


def check_data(cells: Sequence[Cell], *, dry: bool) -> None:
    """Refuse a data folder that lacks the task of a cell that is to run."""
    left = (cell for cell in cells if cell.config.force or not cell.is_complete)
    refuse((find_lack(cell.config.task.name, cell.config.data.dir) for cell in left), dry=dry)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of cells: how many are complete of how many, `done` of them by this call; label -> failure."""

    complete: int
    planned: int
    done: int
    failed: Mapping[str, str]

    @property
    def status(self) -> int:
        """Exit status: 1 if a cell failed."""
        return 1 if self.failed else 0

    def report(self) -> int:
        """Print the counts and why cells failed; the status."""
        print(f"{self.complete} of {self.planned} cells complete, {self.done} of them by this call", flush=True)
        for label, reason in self.failed.items():
            print(f"failed: {label}: {reason}; the next call tries it again", flush=True)
        return self.status


def make(cells: Sequence[Cell], workers: int, poll: float = POLL_SECONDS, threads: int | None = 1) -> int:
    """`make_cells`, and print what became of them; status 1 if some failed."""
    return make_cells(cells, workers, poll, threads).report()


def make_cells(cells: Sequence[Cell], workers: int, poll: float = POLL_SECONDS, threads: int | None = 1) -> Outcome:
    """Make every cell without a complete record, and those with `force` once.

    A cell that another call is running is left to it, and looked at again at the end. A cell that fails is tried once.

    Args:
        cells: in the order of execution.
        workers: number of processes at a time.
        poll: seconds between two looks at cells that another call is running.
        threads: of each process; None: as many as it takes by itself.
    """
    watch = Watch(cells)
    jobs = {cell_job(cell): cell for cell in cells if not watch.is_made(cell)}
    failed: dict[str, str] = {}
    minutes: list[float] = []
    began, lost = time.time(), dict[str, str]()  # task -> the cell that missed the hub for it

    def is_left(job: Job) -> bool:
        if not watch.is_made(jobs[job]) and job.label not in failed:
            if _failed_elsewhere(jobs[job], began):
                failed[job.label] = read_reason(jobs[job])
            elif cause := lost.get(jobs[job].config.task.name):
                failed[job.label] = f"not started, for the reason of {cause}"
        return not watch.is_made(jobs[job]) and job.label not in failed

    def is_needed(job: Job) -> bool:
        # In this order: a run writes its record before it releases its lock.
        return not is_held(jobs[job]) and is_left(job)

    with progress.job("cells", len(cells), unit="cells", done=len(cells) - len(jobs)) as bar:
        while any(is_left(job) for job in jobs):
            started = 0
            with closing(run_jobs(jobs, workers, is_needed, threads=threads)) as ended:
                for one in ended:
                    started += 1
                    _note(one, jobs[one.job], watch, failed, minutes)
                    if lacks_hub(one):
                        lost.setdefault(jobs[one.job].config.task.name, one.job.label)
                    left = [cell for cell in cells if not watch.is_made(cell)]
                    hours = _print_progress(one, left, failed, minutes, workers)
                    bar.update(done=len(cells) - len(left), left=3600 * hours)
            if not started:  # the rest is in the hands of another call
                time.sleep(poll)
    complete = sum(map(watch.is_made, cells))
    return Outcome(complete=complete, planned=len(cells), done=len(minutes), failed=failed)


def read_reason(cell: Cell) -> str:
    """Why a cell failed, from its record."""
    record = cell.record()
    if record is None or record["status"] == "complete":  # an earlier one, which was to be replaced
        return "no new record: see the launcher's log"
    return str(record.get("reason", "failed"))


def _failed_elsewhere(cell: Cell, began: float) -> bool:
    """Whether another call has failed at this cell since `began`, and is not trying it again."""
    path = cell.config.record_path
    return path.exists() and path.stat().st_mtime >= began and not is_held(cell) and not cell.is_complete


def _note(ended: EndedJob, cell: Cell, watch: Watch, failed: dict[str, str], minutes: list[float]) -> None:
    if _BUSY in last_error(ended.job.log):  # another call took it between the check and the start
        return
    if watch.is_made(cell):
        minutes.append(ended.minutes)
    elif not is_held(cell):
        failed[ended.job.label] = explain_end(ended)


def _print_progress(
    ended: EndedJob, left: Sequence[Cell], failed: dict[str, str], minutes: Sequence[float], workers: int
) -> float:
    """Print one line for a cell that has ended; the hours of those that are left."""
    usual = median(minutes) / 60 if minutes else 0.0
    hours = 0.0
    if left:
        estimates = Estimates(Path(left[0].config.results_dir) / "runs")  # anew: the new record is one of them
        for cell in left:
            known, source = estimates.of(facts_of(cell.config.resolved))
            hours += known if known is not None and source == RECORDS else usual
    what = failed.get(ended.job.label, "done")
    progress.say(
        f"{ended.job.label}: {what} ({ended.minutes:.1f} min); {len(left)} cells left, "
        f"about {hours / workers:.1f} hours, {workers} at a time"
    )
    return hours / workers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce.evidence", description=__doc__.splitlines()[0]
    )
    parser.add_argument("block", help="0 to 6, 2a, 2b, or all")
    commands.add_places(parser, trees="block 6 and its searches")
    parser.add_argument("--dry", action="store_true", help="list the cells and their cost without running anything")
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py, for example task=stsb")
    return parser


if __name__ == "__main__":
    sys.exit(main())
