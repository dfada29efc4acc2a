"""`sparsegrad records FOLDER`: the records below a folder as a table, or as CSV."""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsegrad.cli.record_rows import (
    SETTINGS,
    Row,
    average,
    find_differences,
    find_key,
    make_title,
    narrow,
    read_rows,
    shorten_metric,
    sort,
)
from sparsegrad.cli.text_table import Column, fit, render
from sparsegrad.errors import UserError

SHORTEST_KEY = 6
# Ranks of columns: the higher, the sooner a narrow terminal goes without it. What tells runs apart stays longest.
_RANKS = {"minutes": 9, "per_weight": 8, "trainable": 7, "peak_mib": 6, "steps_per_second": 5, "device": 4}
_RANKS |= dict.fromkeys(("protocol", "batch_size"), 2) | dict.fromkeys(("lr", "seed", "engine"), 1)
_RANKS |= dict.fromkeys(("model", "method", "task"), 0)
MEASUREMENT = 5  # and above: without room they are left out; settings go below their row
_INDENT = "    "


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsegrad records`."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="default: %(default)s")
    parser.add_argument("--filter", action="append", default=[], metavar="KEY=VALUE", help="may be given several times")
    parser.add_argument("--sort", metavar="KEY", help="such as score, method, lr, minutes or any setting")
    parser.add_argument("--reverse", action="store_true", help="largest first, with --sort")
    parser.add_argument("--mean", action="store_true", help="mean and standard deviation over seeds")
    parser.add_argument("--csv", action="store_true", help="everything, for a spreadsheet")
    parser.set_defaults(do=show_records)


def show_records(options: argparse.Namespace) -> int:
    """Print what the options ask for.

    Raises:
        UserError: where there are no records, an option names what they do not have, or `--reverse` has no `--sort`.
    """
    folder = options.folder
    if options.reverse and options.sort is None:
        raise UserError("--reverse does nothing alone: add --sort KEY, such as --sort score")
    rows = read_rows(folder, on_bad=lambda error: print(f"skipped: {error}", file=sys.stderr))
    if not rows:
        raise UserError(f"no records below {folder}: run something first, e.g. make quickstart")
    rows = narrow(rows, options.filter)
    if not rows:
        raise UserError(f"no record below {folder} has {' and '.join(options.filter)}")
    order = options.sort and find_key(rows, options.sort, "--sort")
    rows = average(rows) if options.mean else rows
    rows = sort(rows, order, options.reverse) if order else sorted(rows, key=_make_order)
    if options.csv:
        _print_csv(rows)
    else:
        print(make_text(rows, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    return 0


def _make_order(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("task", "protocol", "model", "seed", "finished"))


def _print_csv(rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if "seeds" in rows[0]:  # a row is the mean of several runs
        names = [name for name in names if name not in ("seed", "key", "path", "finished")]
    names.sort(key=lambda name: "." in name)  # facts first, then the settings with their dotted names
    writer = csv.DictWriter(sys.stdout, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def make_text(rows: Sequence[Row], width: int | None) -> str:
    """A line of what all rows share, the table, and a line on the measurements that `width` left no room for.

    Settings without room for a column stand below their row: without them, rows would look the same.
    """
    shared, columns = _make_columns(rows)
    shown, out = fit(columns, width)
    settings = [column for column in out if column.rank < MEASUREMENT]
    lines = [*_wrap(shared, width), *_insert_settings(render(shown).split("\n"), settings, width)]
    if out := [column for column in out if column not in settings]:
        names = ", ".join(column.title.replace("\n", " ") for column in out)
        lines += _wrap(f"Not shown at this width: {names} (a pipe or --csv has all).".split(" "), width, " ")
    if any(column.title.startswith("peak") for column in shown):
        about = "Peak: allocated on a GPU; on a CPU, resident memory above the loaded model."
        lines += _wrap(about.split(" "), width, " ")
    return "\n".join(lines)


def _insert_settings(table: Sequence[str], settings: Sequence[Column], width: int | None) -> list[str]:
    """The lines of a table, with the settings of each row, `name value, ...`, on lines of their own below it."""
    if not settings:
        return list(table)
    count = len(settings[0].cells)
    lines = list(table[:-count])
    for number, line in enumerate(table[-count:]):
        pairs = [f"{one.title} {one.cells[number]}" for one in settings if one.cells[number] != "-"]
        lines += [line, *(_INDENT + more for more in _wrap(pairs, width and width - len(_INDENT)))]
    return lines


def _wrap(parts: Sequence[str], width: int | None, separator: str = ", ") -> list[str]:
    """Join parts into lines of at most `width` characters."""
    lines = [""]
    for part in parts:
        longer = lines[-1] + (separator if lines[-1] else "") + part
        if width is not None and lines[-1] and len(longer) > width:
            lines[-1] += separator.rstrip()
            lines.append(part)
        else:
            lines[-1] = longer
    return [line for line in lines if line]


def _make_columns(rows: Sequence[Row]) -> tuple[list[str], list[Column]]:
    """What all rows share, as texts, and the columns, the most telling first."""
    is_mean = "seeds" in rows[0]
    names = [name for name in SETTINGS if not (is_mean and name == "seed")]
    names += find_differences(rows)
    differ = [name for name in names if name == "method" or len(_find_values(rows, name)) > 1]
    shared = [text for name in names if name not in differ and (text := _describe_shared(rows, name))]
    if is_mean:
        shared.append("mean ± std over seeds")
    columns = [] if is_mean else [Column("key", _shorten_keys([row["key"] for row in rows]))]
    columns += [
        Column(make_title(name), [_format(row.get(name)) for row in rows], _RANKS.get(name, 3)) for name in differ
    ]
    if is_mean:
        columns.append(Column("seeds", [str(row["seeds"]) for row in rows]))
    metrics = {row["metric"] for row in rows if row["metric"] is not None}
    columns.append(
        Column(shorten_metric(metrics.pop()) if len(metrics) == 1 else "score", _scores(rows, bool(metrics)))
    )
    measured = ("steps_per_second", "peak_mib", "trainable", "per_weight", "minutes")
    columns += [Column(make_title(name), [_measure(row, name) for row in rows], _RANKS[name]) for name in measured]
    return shared, columns


def _find_values(rows: Sequence[Row], name: str) -> set[str]:
    values = {repr(row.get(name)) for row in rows}
    # Most methods have no engine, and runs that failed do not say their device.
    return values - {"None"} if name in ("engine", "device") else values


def _describe_shared(rows: Sequence[Row], name: str) -> str:
    """`name value`, with the methods that it is of where others have no such setting; empty where none has."""
    having = [row for row in rows if row.get(name) is not None]
    if not having:
        return ""
    methods = dict.fromkeys(row["method"] for row in having)
    is_of_all = methods.keys() == {row["method"] for row in rows}
    return f"{make_title(name)} {having[0][name]}" + ("" if is_of_all else f" ({', '.join(methods)})")


def _scores(rows: Sequence[Row], named: bool) -> list[str]:
    """Scores to four digits, with their metric where rows have several."""
    cells = []
    for row in rows:
        if row["status"] != "complete" or row["value"] is None:
            cells.append(row["status"] if row["status"] != "complete" else "-")
            continue
        spread = f" ± {row['value_std']:.4f}" if row.get("value_std") is not None else ""
        cells.append((f"{shorten_metric(row['metric'])} " if named else "") + f"{row['value']:.4f}{spread}")
    return cells


def _measure(row: Row, name: str) -> str:
    value = row[name]
    if name == "per_weight":
        return " / ".join(f"{count:,}" for count in sorted(set((value or {}).values()))) or "-"
    if value is None or value != value:  # NaN
        return "-"
    return f"{value:,}" if name == "trainable" else f"{value:.2f}" if name == "steps_per_second" else f"{value:,.0f}"


def _shorten_keys(keys: Sequence[str]) -> list[str]:
    """The first digits of each key, as many as tell all of them apart."""
    length = SHORTEST_KEY
    while len({key[:length] for key in keys}) < len(set(keys)):
        length += 1
    return [key[:length] for key in keys]


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else str(value)
