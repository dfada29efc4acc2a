"""The order of the searches of one call, so that several calls share them: those that nobody works on come first.

After its grid, an adaptive search gives out one trial at a time, so a second worker of it would mostly wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.reproduce.processes import Job
from experiments.reproduce.search import Search


class Shares:
    """The searches that this call works on, each with a lock that other calls see."""

    def __init__(self) -> None:
        self._held: dict[Job, FileLock] = {}

    def pick(self, jobs: Mapping[Job, Search], is_needed: Callable[[Job], bool]) -> Iterator[Job]:
        """The jobs, each chosen when it is asked for: those whose search has a worker elsewhere come last."""
        left = dict(jobs)
        while left:
            job = self._choose(left, is_needed)
            del left[job]
            yield job

    def _choose(self, left: Mapping[Job, Search], is_needed: Callable[[Job], bool]) -> Job:
        """The first job that this call could claim, or that is no longer needed; without one, the first."""
        for job, search in left.items():
            if not is_needed(job) or self._claim(job, search):
                return job
        return next(iter(left))

    def release(self, job: Job) -> None:
        """Let other calls begin with the search of a job that has ended."""
        if (lock := self._held.pop(job, None)) is not None:
            lock.release()

    def close(self) -> None:
        """Release what this call has claimed and did not start."""
        for job in list(self._held):
            self.release(job)

    def _claim(self, job: Job, search: Search) -> bool:
        """Take the search if nobody works on it. Its worker has a trial only some seconds after its start."""
        path = Path(search.plan.base.work_dir) / "locks" / f"{search.study}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        if search.has_worker:  # started by hand, or on another machine
            lock.release()
            return False
        self._held[job] = lock
        return True
