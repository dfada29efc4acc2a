"""Make the runs of the evidence plans: `python -m experiments.reproduce.evidence 2a --data <glue folder>`.

A block is a plan of conf/experiment (experiments/report/blocks.py has their order); `all` makes them one after the
other. Every cell is a process of its own with one thread. Cells with a complete record are not repeated, so the same
command continues after a kill, and several calls share the work. A complete record without its predictions is made
again, as all are with force=true. The records go to results/, with the plan's hash.
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
from experiments.reproduce.commands import last_wins
from experiments.reproduce.counting import mark_uncounted
from experiments.reproduce.places import check_places, find_lack, refuse
from experiments.reproduce.plans import list_blocks, read_plan
from experiments.reproduce.waiting import settle_waiting
from sparsegrad.errors import UserError, check_integer
from sparsegrad.runs.overrides import key_of
from sparsegrad.sweeps.make_commands import make_command
from sparsegrad.sweeps.search_results import COMMITTED


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
    status = max(_make_block(block, request, is_only=name != "all") for block in list_blocks(name))
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
        wanted = search_all.Request(data=request.data, trees=request.trees, overrides=overrides)
        return search_all.make(search_all.plan_searches(wanted), request.workers, dry=request.dry)
    return max(_make_plan(name, block, request) for name in block.plans)


def _make_plan(name: str, block: Step, request: Request) -> int:
    overrides = last_wins((*block.overrides, *request.overrides))
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
    commands.add_places(parser, trees="block 6 and its searches")
    parser.add_argument("--dry", action="store_true", help="list the cells and their cost without running anything")
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py, for example task=stsb")
    return parser


if __name__ == "__main__":
    sys.exit(main())
