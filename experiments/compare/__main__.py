"""Compare methods: `python -m experiments.compare --data <glue folder>`, or `make compare SCALE=mini`.

For each method and task of the plan (conf/experiment/compare.yaml): first the search that it lacks, with the same
number of trials for all; then the runs of all seeds; then the table and the figure in results/compare. METHODS takes
any option of conf/method, such as your own conf/method/peft/mine.yaml. The same command continues after a stop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.compare.block import SHARED, find_shared
from experiments.compare.table import write_comparison
from experiments.paths import CONF
from experiments.reproduce import commands, dry_run, evidence, search_all
from experiments.reproduce.cells import Cell, in_evidence, list_cells
from experiments.reproduce.commands import last_wins, split_names
from experiments.reproduce.plans import read_plan
from sparsegrad.errors import UserError, check_choice

PLANS = ("compare", "compare_smollm2")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 if all is complete, 1 if something failed, 2 after bad input, 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    return commands.run(lambda: _compare_plans(options))


def _compare_plans(options: argparse.Namespace) -> int:
    commands.check_small(options, "SCALE=paper is not planned: the comparison is of the small models; give SCALE=mini")
    request = Request(
        methods=split_names(options.methods),
        tasks=split_names(options.tasks),
        data=options.data,
        trees=options.trees,
        workers=options.workers,
        dry=options.dry,
        overrides=last_wins(in_evidence(options.overrides)),
    )
    return max(compare(name, request) for name in _choose_plans(request))


def _choose_plans(request: Request) -> list[str]:
    """The plans that have one of the tasks; that of the language model only with trees, or if its task is named.

    Raises:
        UserError: for an unknown method or task, or a language task without trees.
    """
    plans = {name: read_plan(name) for name in PLANS}
    known = [task for plan in plans.values() for task in plan.params["task"]]
    for task in request.tasks:
        check_choice("TASKS", task, known)
    for method in request.methods:
        check_choice("METHODS", method, list_methods(), "a YAML of yours in conf/method/peft counts too")
    chosen = [name for name, plan in plans.items() if set(plan.params["task"]) & set(request.tasks or known)]
    for name in list(chosen):
        if plans[name].takes_trees and request.trees is None:
            if request.tasks and chosen == [name]:
                raise UserError(f"TASKS={','.join(request.tasks)} needs TREES=<file of conversation trees>")
            print(f"{name} is left out: it needs TREES=<file of conversation trees>", flush=True)
            chosen.remove(name)
    return chosen


def list_methods() -> list[str]:
    """The options of conf/method."""
    folder = CONF / "method"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def compare(name: str, request: Request) -> int:
    """Search, run and show one plan."""
    plan = read_plan(name)
    methods = list(request.methods) or plan.params["method"]
    tasks = [task for task in plan.params["task"] if task in (request.tasks or [task])]
    data = request.trees if plan.takes_trees else request.data
    print(f"{name}: {len(methods)} methods, {', '.join(tasks)}, {plan.budget} trials each", flush=True)
    arms = [(method, task) for method in methods for task in tasks]
    found = [search_all.plan_search(plan, *arm, data, request.overrides) for arm in arms]
    status = search_all.make(found, request.workers, dry=request.dry)
    cells = [cell for arm in arms for cell in _list_cells(name, *arm, data, request, skips=request.dry or status != 0)]
    if not cells:
        print(f"{name}: the runs wait for their searches", flush=True)
        return status
    mine = [cell for cell in cells if not is_shared(cell)]
    print(f"{len(cells) - len(mine)} of {len(cells)} cells are runs of {', '.join(SHARED)}", flush=True)
    if request.dry:
        dry_run.show(mine)
        return status
    status = max(status, evidence.make(mine, request.workers))
    print(write_comparison(request.results, name), flush=True)
    return status


def _list_cells(name: str, method: str, task: str, data: str | None, request: Request, *, skips: bool) -> list[Cell]:
    """The runs of one method on one task; none where its search is not finished, if `skips`."""
    try:
        return list_cells(name, (*request.overrides, f"method={method}", f"task={task}"), data)
    except UserError:
        if skips:
            return []
        raise


def is_shared(cell: Cell) -> bool:
    """Whether another plan has made this very run, and the table counts it."""
    return find_shared(Path(cell.config.results_dir), cell.experiment, cell.config.key) is not None


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
