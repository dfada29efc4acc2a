"""Where the runs of a table come from: the commits of the code and the machines of runs and searches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from experiments.report.collect import commit_of
from experiments.report.runs import Block
from experiments.report.searches import Search, Searches, machine_of

_UNKNOWN = "unknown"  # of runs whose record names none


def origin_notes(block: Block, searches: Searches | None = None) -> list[str]:
    """Commits and machines of a table's runs, from the oldest, and machines of the searches behind them.

    Args:
        block: the runs.
        searches: of the results folder; None for a table without hours.
    """
    runs = sorted(block.all_runs(), key=lambda run: str(run.record.get("environment", {}).get("finished")))
    behind = [] if searches is None else searches.of_runs(runs)
    return [
        *_count("Code of the runs, as commit (runs)", (commit_of(run.record) for run in runs)),
        *_count("Machines of the runs (runs)", (machine_of(run.record) for run in runs)),
        *_count("Machines of their searches (searches)", map(searches.machines_of, behind) if searches else ()),
        *_name_edges(behind),
    ]


def _name_edges(behind: Iterable[Search]) -> list[str]:
    edges = sorted(search.study for search in behind if search.is_at_edge)
    why = "A better rate may lie beyond those tried, as the best is the smallest or largest of them"
    return [f"{why}: {', '.join(edges)}."] if edges else []


def _count(what: str, names: Iterable[str]) -> list[str]:
    counts = Counter(name or _UNKNOWN for name in names)
    if set(counts) <= {_UNKNOWN}:
        return []
    return [f"{what}: {', '.join(f'{name} ({count})' for name, count in counts.items())}."]
