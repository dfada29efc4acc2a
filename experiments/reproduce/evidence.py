"""Make the runs of the evidence plans: `python -m experiments.reproduce.evidence 2a --data <glue folder>`.

A block is a plan of conf/experiment (experiments/report/blocks.py has their order); `all` makes them one after the
other, and --methods and --tasks choose a part of each. Every cell is a process of its own with one thread. Cells with a
complete record are not repeated, so the same command continues after a kill, and several calls share the work. A
complete record without its predictions is made again, as all are with force=true. The records go to results/, with the
plan's hash.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report.blocks import Step
from experiments.reproduce import commands, dry_run, making, search_all
from experiments.reproduce.cells import Cell, in_evidence, list_with_waiting
from experiments.reproduce.commands import last_wins, split_names
from experiments.reproduce.counting import mark_uncounted
from experiments.reproduce.places import check_places, find_lack, refuse
from experiments.reproduce.plans import list_blocks, read_plan
from experiments.reproduce.selection import check_names, check_repeats, choose_cells, name_choice
from experiments.reproduce.waiting import settle_waiting
from sparsegrad.errors import UserError
from sparsegrad.runs.overrides import key_of
from sparsegrad.sweeps.make_commands import make_command
from sparsegrad.sweeps.search_plans import COMMITTED, SEARCHED


@dataclass(frozen=True, kw_only=True)
class Request:
    """Methods and tasks (empty: all), the data, the number of processes, further overrides, and if it only lists."""

    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data: str | None
    trees: str | None
    workers: int
    overrides: tuple[str, ...]
    dry: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 if all cells are complete, 1 if some failed, 2 after bad input, 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    return commands.run(lambda: _make_blocks(options), options.overrides)


def _make_blocks(options: argparse.Namespace) -> int:
    commands.check_small(options, "SCALE=paper is not planned: the evidence is of the small models; give SCALE=mini")
    request = Request(
        methods=split_names(options.methods),
        tasks=split_names(options.tasks),
        data=options.data,
        trees=options.trees,
        workers=options.workers,
        overrides=tuple(in_evidence(options.overrides)),
        dry=options.dry,
    )
    blocks = list_blocks(options.block)
    check_repeats(request.methods, request.tasks, request.overrides)
    plans = [read_plan(name) for block in blocks for name in block.plans or SEARCHED]
    check_names(plans, request.methods, request.tasks)
    check_places(request.data, request.trees, dry=request.dry)
    status = max(_make_block(block, request, is_only=options.block != "all") for block in blocks)
    if not request.dry:
        print(f"next: {_report_command(request.overrides)} rebuilds the tables", flush=True)
    return status


def _report_command(overrides: Sequence[str]) -> str:
    """`make report` for the folder of the records."""
    (place,) = (one.partition("=")[2] for one in last_wins(overrides) if key_of(one) == "results_dir")
    return make_command("report", scale=None, args=[] if place == COMMITTED else ["--results-dir", shlex.quote(place)])


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
        chosen = {"methods": request.methods, "tasks": request.tasks, "overrides": overrides}
        wanted = search_all.Request(**chosen, data=request.data, trees=request.trees)
        return search_all.make(search_all.plan_searches(wanted), request.workers, dry=request.dry)
    return max(_make_plan(name, block, request) for name in block.plans)


def _make_plan(name: str, block: Step, request: Request) -> int:
    chosen = choose_cells(read_plan(name), request.methods, request.tasks)
    if chosen is None:
        print(f"left out: {name} has no {name_choice(request.methods, request.tasks)}", flush=True)
        return 0
    overrides = last_wins((*block.overrides, *chosen, *request.overrides))
    cells = plan_cells(name, overrides, request.trees if block.takes_trees else request.data, dry=request.dry)
    cells = mark_uncounted(cells, read_plan(name))
    if request.dry:
        dry_run.show(cells)
        return 0
    return making.make(cells, request.workers)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce.evidence", description=__doc__.splitlines()[0]
    )
    parser.add_argument("block", help="0 to 6, 2a, 2b, or all")
    commands.add_selection(parser)
    commands.add_places(parser, trees="block 6 and its searches")
    parser.add_argument("--dry", action="store_true", help="list the cells and their cost without running anything")
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py, for example task=stsb")
    return parser


if __name__ == "__main__":
    sys.exit(main())
