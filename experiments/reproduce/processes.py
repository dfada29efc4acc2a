"""Cells and searches as processes of their own: their commands and logs, several at a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.paths import ROOT
from experiments.reproduce.cells import Cell
from experiments.reproduce.places import in_words_of_make, name_of_place
from sparsegrad.errors import BusyError
from sparsegrad.runs.run_folder import run_lock

POLL_SECONDS = 0.2
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt): ")
_NO_HUB = "the hub cannot be reached"  # part of the message of a run that needs it
_PATIENCE = 60.0  # seconds for a stopped run to write its checkpoint
# Each step allocates and frees the same large tensors. By default, glibc returns their memory to the system and gets it
# back in small pages; kept, in huge pages, it saves a tenth of a step of MiniLM. Other systems ignore the variable.
_KEEP_MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process to start.

    Attributes:
        label: its name in messages.
        command: what is started.
        log: the file that its output goes to.
        place: what its `data.dir` is called in the `make` command.
    """

    label: str
    command: tuple[str, ...]
    log: Path
    place: str = "DATA"


@dataclass(frozen=True, kw_only=True)
class EndedJob:
    """A job that has ended: its exit status, and the minutes it took."""

    job: Job
    status: int
    minutes: float


def cell_job(cell: Cell) -> Job:
    """The process that makes one cell; `experiment=` lets its record name the plan."""
    own = [one for one in cell.overrides if not one.startswith("hydra.")]
    command = [sys.executable, str(ROOT / "run.py"), f"experiment={cell.experiment}", *own, "hydra.mode=RUN"]
    log = log_path(cell.config.work_dir, cell.config.key)
    place = name_of_place(cell.config.task.name)
    return Job(label=f"{cell.experiment} {cell.label}", command=tuple(command), log=log, place=place)


def log_path(work_dir: str, name: str) -> Path:
    """The log of a job of this process: two calls that start the same job within seconds have one each."""
    return Path(work_dir) / "logs" / f"{name}-{os.getpid()}.log"


def is_held(cell: Cell) -> bool:
    """Whether another process is running the cell."""
    try:
        with run_lock(cell.config, wait=0.0):
            return False
    except BusyError:
        return True


def last_error(log: Path) -> str:
    """The last error message of a log, else the last exception of a traceback, else an empty text."""
    lines = _read_lines(log)
    errors = [line for line in lines if line.startswith("error: ")]
    # An exception's text can have more lines: those of CUDA end in advice on debugging.
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return (errors or exceptions or [""])[-1].removeprefix("error: ")


def explain_end(ended: EndedJob) -> str:
    """Why a job has not done its work: the signal that ended it and its error message, else its status."""
    log, message = ended.job.log, in_words_of_make(last_error(ended.job.log), ended.job.place)
    if ended.status < 0:
        # Such a process had no time to say why: the last line of its log is often a bar of progress.
        killed = f"killed by {_name_signal(-ended.status)}, see {log}"
        return f"{message}; {killed}" if message else killed
    if message:
        return message
    last = _read_lines(log)[-1:]
    return f"ended with status {ended.status}, see {log}" + "".join(f" (last line: {line})" for line in last)


def lacks_hub(ended: EndedJob) -> bool:
    """Whether a job failed because the hub cannot be reached: others of its task would fail one by one as well."""
    return ended.status != 0 and _NO_HUB in last_error(ended.job.log)


def _read_lines(log: Path) -> list[str]:
    """The lines of a log that are not empty; those that a bar of progress has replaced are lines, too."""
    text = log.read_text(errors="replace", encoding="utf-8").replace("\r", "\n")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _name_signal(number: int) -> str:
    """`SIGTERM`; for SIGKILL, with its usual cause."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
    return f"{name} (often because memory ran out)" if name == "SIGKILL" else name


def run_jobs(
    jobs: Iterable[Job],
    workers: int,
    is_needed: Callable[[Job], bool] = lambda job: True,
    on_wait: Callable[[], None] = lambda: None,
    *,
    threads: int | None = 1,
) -> Generator[EndedJob, None, None]:
    """Run jobs, `workers` at a time; yield each as it ends.

    Args:
        jobs: in the order of their start.
        workers: number of processes at a time.
        is_needed: asked just before a job starts, as another process may have done it meanwhile.
        on_wait: called several times a second while jobs run.
        threads: of each job; None: as many as it takes by itself. Two pools of threads that compete for the cores slow
            both down tenfold.
    """
    waiting, running = iter(jobs), dict[Job, tuple[subprocess.Popen[bytes], float]]()
    with _stop_on_signal():
        try:
            while True:
                while len(running) < workers and (job := next(filter(is_needed, waiting), None)) is not None:
                    running[job] = _start(job, threads), time.monotonic()
                ended = [job for job, (process, _) in running.items() if process.poll() is not None]
                for job in ended:
                    process, began = running.pop(job)
                    yield EndedJob(job=job, status=process.returncode, minutes=(time.monotonic() - began) / 60)
                if not running and not ended:
                    return
                if not ended:
                    on_wait()
                    time.sleep(POLL_SECONDS)
        finally:
            _stop([process for process, _ in running.values()])


def _start(job: Job, threads: int | None) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as output:
        environment = {"GLIBC_TUNABLES": _KEEP_MEMORY, **os.environ}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        return subprocess.Popen(job.command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def run_to_its_end(command: Sequence[str]) -> None:
    """Run a command whose output is shown; after Ctrl-C, which reaches it too, it may first write its checkpoint.

    `subprocess.run` would kill it a quarter of a second after Ctrl-C.
    """
    process = subprocess.Popen(command)
    try:
        process.wait()
    except BaseException:
        _stop([process])
        raise


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let runs write a checkpoint and end, and kill those that do not."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def _stop_on_signal() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that the processes started here are stopped too."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
