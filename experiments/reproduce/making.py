"""Make the cells of a plan that have no complete record, several at a time, beside other calls that do the same."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.reproduce.cells import Cell
from experiments.reproduce.costs import RECORDS, Estimates, facts_of
from experiments.reproduce.counting import Watch, drop_aside, set_aside
from experiments.reproduce.processes import (
    EndedJob,
    Job,
    cell_job,
    explain_end,
    is_held,
    lacks_hub,
    run_jobs,
)
from sparsegrad import progress
from sparsegrad.errors import BUSY

POLL_SECONDS = 5.0
_DONE, _ELSEWHERE = "done", "at work in another call"


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
    """Make every cell without a complete record, and those with `force` or an uncounted record once.

    A cell that another call is running is left to it, and looked at again at the end. A cell that fails is tried once.

    Args:
        cells: in the order of execution.
        workers: number of processes at a time.
        poll: seconds between two looks at cells that another call is running.
        threads: of each process; None: as many as it takes by itself.
    """
    state = _State(cells)
    with progress.job("cells", len(cells), unit="cells", done=len(cells) - len(state.jobs)) as bar:
        while any(map(state.is_left, state.jobs)):
            started = 0
            with closing(run_jobs(state.jobs, workers, state.is_needed, threads=threads)) as ended:
                for one in ended:
                    started += 1
                    what = state.note(one)
                    left = state.list_missing()
                    hours = state.estimate_hours(left) / workers
                    about = f"{len(left)} cells left, about {hours:.1f} hours, {workers} at a time"
                    progress.say(f"{one.job.label}: {what} ({one.minutes:.1f} min); {about}")
                    bar.update(done=len(cells) - len(left), left=3600 * hours)
            if not started:  # the rest is in the hands of another call
                time.sleep(poll)
    return state.summarize()


class _State:
    """What one call knows of its cells.

    Attributes:
        jobs: process -> its cell, of all cells that were not made before.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells, self._watch, self._began = cells, Watch(cells), time.time()
        self.jobs = {cell_job(cell): cell for cell in self.list_missing()}
        self._failed: dict[str, str] = {}  # label -> reason
        self._minutes: list[float] = []  # of the cells that this call made
        self._offline: dict[str, str] = {}  # task -> label of the cell that missed the hub for it

    def is_needed(self, job: Job) -> bool:
        """Whether this call should start the cell now; if so, a record that does not count is out of its way."""
        # In this order: a run writes its record before it releases its lock.
        if is_held(self.jobs[job]) or not self.is_left(job):
            return False
        set_aside(self.jobs[job])
        return True

    def is_left(self, job: Job) -> bool:
        """Whether the cell has neither been made nor failed, here or in another call; notes a failure elsewhere."""
        cell = self.jobs[job]
        if self._watch.is_made(cell) or job.label in self._failed:
            return False
        if _failed_elsewhere(cell, self._began):
            self._failed[job.label] = read_reason(cell)
        elif cause := self._offline.get(cell.config.task.name):
            self._failed[job.label] = f"not started, for the reason of {cause}"
        return job.label not in self._failed

    def note(self, ended: EndedJob) -> str:
        """Note what became of a cell whose process has ended; in words."""
        job, cell = ended.job, self.jobs[ended.job]
        if lacks_hub(ended):
            self._offline.setdefault(cell.config.task.name, job.label)
        if ended.status == BUSY:  # another call took it between the check and the start
            return _ELSEWHERE
        if self._watch.is_made(cell):
            self._minutes.append(ended.minutes)
            drop_aside(cell)
            return _DONE
        if is_held(cell):
            return _ELSEWHERE
        self._failed[job.label] = explain_end(ended)
        return self._failed[job.label]

    def list_missing(self) -> list[Cell]:
        """The cells that are not made, those that failed included."""
        return [cell for cell in self._cells if not self._watch.is_made(cell)]

    def estimate_hours(self, left: Sequence[Cell]) -> float:
        """Hours of the cells `left`, one at a time: as of similar records, else as usual in this call."""
        if not left:
            return 0.0
        usual = median(self._minutes) / 60 if self._minutes else 0.0
        estimates = Estimates(Path(left[0].config.results_dir) / "runs")  # anew: the new record is one of them
        found = [estimates.of(facts_of(cell.config.resolved)) for cell in left]
        return sum(known if known is not None and source == RECORDS else usual for known, source in found)

    def summarize(self) -> Outcome:
        """What became of the cells."""
        complete = len(self._cells) - len(self.list_missing())
        return Outcome(complete=complete, planned=len(self._cells), done=len(self._minutes), failed=self._failed)


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
