"""Cells whose rates come from searches that have not been made: how many they are, and the command that makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.report.blocks import BLOCKS
from experiments.reproduce.cells import Cell
from experiments.reproduce.places import in_words_of_make, name_of_place
from experiments.reproduce.plans import read_plan
from sparsegrad.errors import UserError
from sparsegrad.sweeps.make_commands import LANGUAGE_TASK, search_command
from sparsegrad.sweeps.search_plans import where_of
from sparsegrad.sweeps.search_results import SearchMissingError


def count_waiting(cells: Sequence[Cell]) -> str:
    """`3 of 9 cells wait for 1 search`; empty if none waits."""
    waiting = [cell for cell in cells if cell.waits is not None]
    if not waiting:
        return ""
    searches = len(_find_searches(waiting))
    verb, noun = "waits" if len(waiting) == 1 else "wait", "search" if searches == 1 else "searches"
    return f"{len(waiting)} of {len(cells)} cells {verb} for {searches} {noun}"


def settle_waiting(cells: Sequence[Cell], data: str | None, *, dry: bool) -> None:
    """Say which cells wait for searches, and which command makes these; without `dry`, refuse to run the others.

    Args:
        cells: those of one experiment, also those that wait.
        data: what the searches are to read: the folder with GLUE, or the trees of a language model.
        dry: whether the cells are only listed.

    Raises:
        UserError: if cells wait, and they are to be run.
    """
    count = count_waiting(cells)
    if not count:
        return
    found = list(_find_searches(cells).values())
    others = [one for one in found if one.is_other]
    if others or len(found) == 1:
        place = name_of_place(cells[0].config.task.name)
        text = f"{cells[0].experiment}: {count}: {in_words_of_make(str((others or found)[0]), place)}"
    else:
        command = _command_of(cells[0], found, data)
        text = f"{cells[0].experiment}: {count}: {command} makes them (the first: {found[0].reason})"
    if not dry:
        raise UserError(text)
    print(text, flush=True)


def _find_searches(cells: Sequence[Cell]) -> Mapping[str, SearchMissingError]:
    """Name of each search that cells wait for -> what is wrong with it."""
    return {cell.waits.study: cell.waits for cell in cells if cell.waits is not None}


def _command_of(cell: Cell, found: Sequence[SearchMissingError], data: str | None) -> str:
    """`make search`, narrowed to the methods and tasks that are missing unless these are all of the plan."""
    grid = read_plan(cell.experiment).grid if cell.experiment in BLOCKS else {}
    methods, tasks = list(dict.fromkeys(one.method for one in found)), list(dict.fromkeys(one.task for one in found))
    if set(methods) >= set(grid.get("method", [None])):
        methods = []
    if set(tasks) >= set(grid.get("task", [None])) and LANGUAGE_TASK not in tasks:  # else it would search GLUE, too
        tasks = []
    return search_command("search", methods, tasks, data, where_of(cell.config.results_dir))
