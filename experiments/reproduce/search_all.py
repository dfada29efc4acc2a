"""Fill the searches of the evidence plans: `python -m experiments.reproduce.search_all --data <glue folder>`.

Every method and task of a plan has one study with the plan's number of trials (`evidence.budget`), so that all methods
are tuned alike. Finished studies are left alone; the same command continues a stopped one. Several calls can share the
work: each begins with the studies that have no worker, and two workers of one study never run the same trial. The
summaries in results/studies are what `hparams=search` reads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from experiments.paths import ROOT
from experiments.report.plans import EvidencePlan
from experiments.reproduce import commands, searches, stale_searches
from experiments.reproduce.cells import in_evidence
from experiments.reproduce.commands import split_names
from experiments.reproduce.places import check_places, find_lack, name_of_place, refuse
from experiments.reproduce.plans import read_plan
from experiments.reproduce.processes import EndedJob, Job, explain_end, lacks_hub, log_path, run_jobs
from experiments.reproduce.search import Search
from experiments.reproduce.selection import check_names, check_repeats, select_arms
from experiments.reproduce.sharing import Shares
from sparsegrad import progress
from sparsegrad.runs.overrides import key_of
from sparsegrad.sweeps.ledger import REASON
from sparsegrad.sweeps.make_commands import make_command, search_command
from sparsegrad.sweeps.search_plans import SEARCHED, target_of
from sparsegrad.sweeps.search_results import OVERWRITE
from sparsegrad.sweeps.search_way import SWEEPS
from sparsegrad.sweeps.show import check_plot_packages, export, write_plots
from sparsegrad.sweeps.study import load_study, quiet

COUNT_SECONDS = 60.0  # between two counts of the finished trials; one takes over a second of a core


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is searched: methods and tasks (empty: all), the data, further overrides of run.py."""

    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data: str | None = None
    trees: str | None = None
    overrides: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 if all searches are finished, 1 if not, 2 after bad input, 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    return commands.run(lambda: _search(options))


def _search(options: argparse.Namespace) -> int:
    tables = " and ".join(
        make_command(f"reproduce-{name}", scale="paper", data=options.data) for name in searches.TABLES
    )
    commands.check_small(options, f"these searches are of the small models: give SCALE=mini; at the paper's: {tables}")
    request = Request(
        methods=split_names(options.methods),
        tasks=split_names(options.tasks),
        data=options.data,
        trees=options.trees,
        overrides=tuple(in_evidence(options.overrides)),
    )
    check_repeats(request.methods, request.tasks, request.overrides)
    check_places(options.data, options.trees, dry=options.dry)
    return make(plan_searches(request), options.workers, dry=options.dry)


def plan_searches(request: Request) -> list[Search]:
    """The searches of all plans, checked before anything runs; SmolLM2's only where there are trees.

    Raises:
        UserError: for methods or tasks that no plan has, searches that need trees alone without them, or a plan that is
            not in order.
    """
    plans = [read_plan(name) for name in SEARCHED]
    request = _narrow(request)
    check_names(plans, request.methods, request.tasks)
    arms = select_arms(plans, request.methods, request.tasks, has_trees=request.trees is not None)
    return [
        plan_search(plan, method, task, request.trees if plan.takes_trees else request.data, request.overrides)
        for plan, method, task in arms
    ]


def _narrow(request: Request) -> Request:
    """Overrides `method=` and `task=` choose searches, as they choose cells; each search has one of its own."""
    chosen: dict[str, tuple[str, ...]] = {"method": request.methods, "task": request.tasks}
    for one in request.overrides:
        key, _, value = one.partition("=")
        if key in chosen:
            chosen[key] = split_names(value)
    rest = tuple(one for one in request.overrides if key_of(one) not in chosen)
    return replace(request, methods=chosen["method"], tasks=chosen["task"], overrides=rest)


def plan_search(plan: EvidencePlan, method: str, task: str, data: str | None, overrides: Sequence[str]) -> Search:
    """The search of one method on one task, with the plan's budget and regime.

    Raises:
        UserError: for a value that is not allowed, such as a seed or a pruner, or another search of the same name.
    """
    searches.check_alike(overrides)
    sweep = SWEEPS[plan.regime == "paper"]
    about = [f"experiment={plan.experiment}", f"sweep={sweep}", f"task={task}", f"method={method}"]
    anew = search_command(target_of(plan.experiment), [method], [task], data, commands.carried(overrides, OVERWRITE))
    return searches.make_search([*about, *overrides, "hydra.mode=RUN"], task, data, anew)


def make(
    found: Sequence[Search],
    workers: int,
    *,
    dry: bool,
    launcher: str = "local",
    threads: int | None = 1,
    plots: bool = False,
) -> int:
    """Finish the searches, or list what they lack if `dry`; status 1 if trials are left.

    With `sweep.overwrite=true`, searches of other settings than those asked for are deleted first, and only those.

    Args:
        found: the searches.
        workers: number of processes at a time on this machine.
        dry: whether it only lists.
        launcher: `local`, or the Hydra launcher that starts a worker for each search instead.
        threads: of each process on this machine; None: as many as it takes by itself.
        plots: whether the plots of a finished search are stored beside its summary.
    """
    quiet()
    # Finished trials are counted last: opening a storage takes a moment.
    refuse((lack for one in found if (lack := _find_lack(one)) and not one.is_finished), dry=dry)
    stale = _find_stale(found)
    if dry:
        searches.show(found, stale)
        return 0
    if plots and (stale or not all(one.is_summarised for one in found)):
        check_plot_packages()  # now: the plots are drawn when a search has taken its hours
    stale_searches.delete_stale(stale)
    _export_all(found, plots=plots)  # also those that others finished, but that have no summary yet
    if launcher == "local":
        _run_workers(found, workers, threads, plots=plots)
    else:
        searches.launch([one for one in found if not one.is_finished], launcher)
        _export_all(found, plots=plots)
    return 1 if _report_open(found) else 0


def _find_lack(search: Search) -> str:
    return find_lack(search.plan.base.task.name, search.plan.base.data.dir)


def _find_stale(found: Sequence[Search]) -> list[Search]:
    """The searches that `sweep.overwrite=true` makes anew; prints them with the reason, and how many it keeps."""
    overwritten = [one for one in found if one.plan.sweep.overwrite]
    reasons = [stale_searches.find_staleness(one) for one in overwritten]
    stale = [one for one, reason in zip(overwritten, reasons, strict=True) if reason]
    for one, reason in zip(stale, filter(None, reasons), strict=True):
        print(f"search {one.study} is made anew: {reason}", flush=True)
    if kept := len(overwritten) - len(stale):
        print(f"kept, because the settings are those asked for: {kept} of {len(overwritten)} searches", flush=True)
    return stale


def _run_workers(found: Sequence[Search], workers: int, threads: int | None, *, plots: bool) -> None:
    """Run a worker for each search that is not finished, `workers` at a time, and show the trials."""
    jobs = {search_job(one): one for one in found}
    budget = sum(one.plan.budget for one in found)
    counted, lost = time.monotonic(), set[str]()  # tasks that need the hub, which cannot be reached

    def is_needed(job: Job) -> bool:
        return not jobs[job].is_finished and jobs[job].plan.base.task.name not in lost

    def count() -> None:  # a study takes its worker hours, and its trials are in the storage meanwhile
        nonlocal counted
        if time.monotonic() - counted > COUNT_SECONDS:
            bar.update(done=budget - _count_left(found))
            counted = time.monotonic()

    with (
        progress.job("trials", budget, unit="trials", done=budget - _count_left(found)) as bar,
        closing(Shares()) as shares,
        closing(run_jobs(shares.pick(jobs, is_needed), workers, is_needed, count, threads=threads)) as ended,
    ):
        for job in ended:
            shares.release(job.job)
            if lacks_hub(job):
                lost.add(jobs[job.job].plan.base.task.name)
            export_finished(jobs[job.job], plots=plots)
            _report(job, jobs[job.job], found)
            bar.update(done=budget - _count_left(found))


def _report_open(found: Sequence[Search]) -> bool:
    """Print the searches with trials left, and those without a completed trial; whether there are any."""
    left = [one for one in found if not one.is_finished]
    for one in left:
        print(f"left: search {one.study}: {one.finished()} of {one.plan.budget} trials; the next call continues it")
    barren = [one for one in found if one.is_barren]
    for one in barren:
        print(
            f"failed: search {one.study}: none of its {one.plan.budget} trials was completed ({_read_reason(one)}): "
            f"correct the method's settings, then make it anew with {one.anew}"
        )
    return bool(left or barren)


def search_job(search: Search) -> Job:
    """The process that adds a worker to a search."""
    base, command = search.plan.base, (sys.executable, str(ROOT / "run.py"), *search.worker_overrides)
    place, log = name_of_place(base.task.name), log_path(base.work_dir, search.study)
    return Job(label=search.study, command=command, log=log, place=place)


def _export_all(found: Sequence[Search], *, plots: bool) -> None:
    for one in found:
        export_finished(one, plots=plots)


def export_finished(search: Search, *, plots: bool = False) -> None:
    """Write the summary of a finished search that has none of all trials yet, and with `plots` its plots.

    A search without a completed trial has no summary: `make` reports it at the end, and the others go on.
    """
    if search.is_finished and not search.is_summarised and not search.is_barren:
        study = load_study(search.plan.sweep.storage, search.study)
        export(study, search.summary.parent)
        if plots:
            list(write_plots(study, search.summary.parent))


def _read_reason(search: Search) -> str:
    """Why the last trial of a search without a completed trial ended."""
    study = search.load_study()
    reasons = [trial.user_attrs[REASON] for trial in study.get_trials() if REASON in trial.user_attrs] if study else []
    return reasons[-1] if reasons else "no reason is stored"


def _report(ended: EndedJob, search: Search, found: Sequence[Search]) -> None:
    """One line on a search whose worker has ended: what is left of it and, once it is finished, of the others."""
    took, budget = f"{ended.minutes:.1f} min", search.plan.budget
    if left := budget - search.finished():
        what = f"stopped after {took}, {left} of {budget} trials left: {explain_end(ended)}"
    else:
        what = f"finished in {took}; {sum(not one.is_finished for one in found)} of {len(found)} searches left"
    progress.say(f"search {search.study}: {what}")


def _count_left(found: Sequence[Search]) -> int:
    return sum(one.plan.budget - one.finished() for one in found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce.search_all", description=__doc__.splitlines()[0]
    )
    commands.add_selection(parser)
    commands.add_places(parser, trees="SmolLM2")
    parser.add_argument(
        "--dry", action="store_true", help="list the searches and what they lack without running anything"
    )
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py, for example results_dir=elsewhere")
    return parser


if __name__ == "__main__":
    sys.exit(main())
