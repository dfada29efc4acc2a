"""Compare methods: `python -m experiments.compare --data <glue folder>`, or `make compare SCALE=mini`.

For each method and task of the plan (conf/experiment/compare.yaml): first the search that it lacks, with the same
number of trials for all; then the runs of all seeds; then the table and the figure in results/compare. METHODS takes
any option of conf/method, such as your own conf/method/peft/mine.yaml. The same command continues after a stop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.compare.methods import find_method
from experiments.compare.methods import list_methods as list_methods
from experiments.report.comparison.block import SHARED, find_shared
from experiments.report.comparison.table import write_comparison
from experiments.report.plans import EvidencePlan
from experiments.reproduce import commands, dry_run, evidence, making, search_all
from experiments.reproduce.cells import Cell, in_evidence, list_with_waiting
from experiments.reproduce.commands import last_wins, split_names
from experiments.reproduce.counting import mark_uncounted
from experiments.reproduce.places import check_places, in_words_of_make, name_of_place
from experiments.reproduce.plans import read_plan
from experiments.reproduce.search import Search
from experiments.reproduce.waiting import count_waiting
from sparsegrad.errors import UserError, check_choice
from sparsegrad.runs.overrides import key_of
from sparsegrad.sweeps.search_plans import COMPARED

# Overrides that other arguments of the command replace.
CHOSEN = {"method": "give METHODS=", "task": "give TASKS=", "experiment": "TASKS= chooses the plan"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is compared; empty methods or tasks: all of the plans."""

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    data: str | None
    trees: str | None
    workers: int
    dry: bool
    overrides: tuple[str, ...]

    @property
    def results(self) -> Path:
        """The results folder."""
        given = [one.partition("=")[2] for one in self.overrides if one.startswith("results_dir=")]
        return Path(given[-1])

    @property
    def of_searches(self) -> tuple[str, ...]:
        """Overrides of the searches, whose seed is none of the report's."""
        return tuple(one for one in self.overrides if key_of(one) != "seed")

    @property
    def of_runs(self) -> tuple[str, ...]:
        """Overrides of the runs."""
        return tuple(one for one in self.overrides if not key_of(one).startswith("sweep."))


@dataclass(frozen=True)
class EndedPlan:
    """How a plan has ended: its status so far, the cells that this call made, and the arms that are left out."""

    status: int = 0
    outcome: making.Outcome | None = None
    left_out: tuple[str, ...] = ()

    def report(self) -> int:
        """Print what failed; the status."""
        made = self.outcome.report() if self.outcome else 0
        for line in self.left_out:
            print(f"left out: {line}", flush=True)
        return max(self.status, made, int(bool(self.left_out)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 if all is complete, 1 if something failed, 2 after bad input, 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    return commands.run(lambda: _compare_plans(options), options.overrides)


def _compare_plans(options: argparse.Namespace) -> int:
    commands.check_small(options, "SCALE=paper is not planned: the comparison is of the small models; give SCALE=mini")
    request = Request(
        methods=tuple(dict.fromkeys(find_method(one) for one in split_names(options.methods))),
        tasks=split_names(options.tasks),
        data=options.data,
        trees=options.trees,
        workers=options.workers,
        dry=options.dry,
        overrides=last_wins(in_evidence(options.overrides)),
    )
    _check_overrides(request.overrides)
    check_places(request.data, request.trees, dry=request.dry)
    plans, ended = _choose_plans(request), list[EndedPlan]()
    try:
        for name in plans:
            ended.append(compare(name, request))
    finally:  # after all tables, above which it would be lost, and also if a later plan is refused or stopped
        status = max([one.report() for one in ended], default=0)
    return status


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that would change what METHODS and TASKS choose."""
    for one in overrides:
        if key_of(one) in CHOSEN:
            raise UserError(f"ARGS={one} is not allowed here: {CHOSEN[key_of(one)]}")


def _choose_plans(request: Request) -> list[str]:
    """The plans that have one of the tasks.

    Raises:
        UserError: for an unknown task, or language tasks alone without trees.
    """
    plans = {name: read_plan(name) for name in COMPARED}
    known = [task for plan in plans.values() for task in plan.grid["task"]]
    for task in request.tasks:
        check_choice("TASKS", task, known)
    chosen = [name for name, plan in plans.items() if set(plan.grid["task"]) & set(request.tasks or known)]
    if request.trees is None and all(plans[name].takes_trees for name in chosen):
        raise UserError(f"TASKS={','.join(request.tasks)} needs TREES=<file of conversation trees>")
    return chosen


def compare(name: str, request: Request) -> EndedPlan:
    """Search, run and show one plan."""
    plan = read_plan(name)
    if plan.takes_trees and request.trees is None:
        print(f"{name}: no new searches and runs, which need TREES=<file of conversation trees>", flush=True)
        if not request.dry and _has_runs(name, request.results):
            print(write_comparison(request.results, name), flush=True)
        return EndedPlan()
    methods = request.methods or plan.grid["method"]
    tasks = [task for task in plan.grid["task"] if task in (request.tasks or [task])]
    data = request.trees if plan.takes_trees else request.data
    print(f"{name}: {len(methods)} methods, {', '.join(tasks)}, {plan.budget} trials each", flush=True)
    arms = [(method, task) for method in methods for task in tasks]
    found = [search_all.plan_search(plan, *arm, data, request.of_searches) for arm in arms]
    _check_names(methods, [found[number * len(tasks)] for number in range(len(methods))])
    status = search_all.make(found, request.workers, dry=request.dry)
    cells = [cell for arm in arms for cell in _list_arm(name, arm, data, request)]
    mine = _leave_shared(cells, plan)
    if request.dry:
        _list_missing(mine)
        return EndedPlan(status)
    ready = [cell for cell in mine if cell.waits is None]
    outcome = making.make_cells(ready, request.workers) if ready else None
    print(write_comparison(request.results, name), flush=True)
    return EndedPlan(status, outcome, tuple(_explain_left_out(arms, found, cells)))


def _list_arm(name: str, arm: tuple[str, str], data: str | None, request: Request) -> list[Cell]:
    """The runs of a method on a task; they wait if its search gave no rate."""
    method, task = arm
    return list_with_waiting(name, (*request.of_runs, f"method={method}", f"task={task}"), data)


def _leave_shared(cells: Sequence[Cell], plan: EvidencePlan) -> list[Cell]:
    """The cells that are no runs of other plans, to be made again where the table would not count them."""
    mine = [cell for cell in cells if cell.waits is not None or not is_shared(cell)]
    print(f"{len(cells) - len(mine)} of {len(cells)} cells are runs of {', '.join(SHARED)}", flush=True)
    # METHODS takes any method, so none is a departure from the plan.
    names = tuple(dict.fromkeys(cell.config.method.name for cell in mine))
    return mark_uncounted(mine, replace(plan, grid={**plan.grid, "method": names}))


def _list_missing(cells: Sequence[Cell]) -> None:
    """`DRY=1`: the cells, and how many of them wait; with another rate they take the same time."""
    evidence.check_data(cells, dry=True)
    if waiting := count_waiting(cells):
        print(f"{cells[0].experiment}: {waiting}, which the same command makes first", flush=True)
    if cells:
        dry_run.show(cells)


def _explain_left_out(arms: Sequence[tuple[str, str]], found: Sequence[Search], cells: Sequence[Cell]) -> Iterator[str]:
    """The arms whose searches gave no rate, each with the reason and the remedy."""
    missing = {error.study: error for cell in cells if (error := cell.waits) is not None}
    for (method, task), search in zip(arms, found, strict=True):
        if search.study not in missing:
            continue
        if search.is_barren:
            reason = f"no trial of its search was completed: correct the method's settings, then {search.anew}"
        else:
            reason = in_words_of_make(str(missing[search.study]), name_of_place(task))
        yield f"{method} on {task}: {reason}"


def _check_names(methods: Sequence[str], found: Sequence[Search]) -> None:
    """Refuse methods whose searches, records and rows would have the name of another.

    Raises:
        UserError: for a YAML whose name is not that of its file, or two files of one name.
    """
    named: dict[str, str] = {}
    for method, search in zip(methods, found, strict=True):
        name, stem = search.plan.base.method.name, method.rpartition("/")[2]
        if name != stem:
            raise UserError(
                f"METHODS={method} has name: {name}, by which its searches and rows would be those of {name}: write "
                f"name: {stem} into conf/method/{method}.yaml"
            )
        if name in named:
            raise UserError(f"METHODS={named[name]},{method} have the same name: rename one file and its name:")
        named[name] = method


def is_shared(cell: Cell) -> bool:
    """Whether another plan has made this very run, and the table counts it."""
    return find_shared(Path(cell.config.results_dir), cell.experiment, cell.config.key) is not None


def _has_runs(name: str, results: Path) -> bool:
    """Whether the language model has runs of this plan, or of one that shares its runs."""
    folders = [name, *(one for one in SHARED if read_plan(one).takes_trees)]
    return any(next((results / "runs" / folder).glob("*.json"), None) for folder in folders)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="mini", help="mini: the plans are of the small models")
    parser.add_argument("--methods", help="options of conf/method, comma-separated; default: those of the plan")
    parser.add_argument("--tasks", help="tasks of the plans, comma-separated; default: all")
    commands.add_places(parser, trees="SmolLM2")
    parser.add_argument("--dry", action="store_true", help="list searches and cells without running anything")
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py, for example results_dir=elsewhere")
    return parser


if __name__ == "__main__":
    sys.exit(main())
