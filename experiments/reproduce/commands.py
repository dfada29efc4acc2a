"""What the commands that make the evidence share: their options, their overrides, and how they end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

from experiments.paths import SCALES
from sparsegrad.cli import replace_unprintable
from sparsegrad.errors import UserError, check_choice, check_integer, run_as_command
from sparsegrad.runs.overrides import key_of


def run(command: Callable[[], int], overrides: Sequence[str] = ()) -> int:
    """Run a command that can be stopped at any time: status as of `run_as_command`."""
    replace_unprintable()  # tables have signs that some terminals lack
    what = "makes all runs again, because of force=true" if "force=true" in overrides else "continues where it stopped"
    return run_as_command(command, f"interrupted: the same command {what}")


def add_places(parser: argparse.ArgumentParser, trees: str) -> None:
    """Options that say where the data is and how many processes run; `trees` names what needs conversation trees."""
    parser.add_argument("--data", help="folder with GLUE (default: download from the hub)")
    parser.add_argument("--trees", help=f"file of OpenAssistant conversation trees, for {trees}")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, one thread each (default: 2)")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Options of the commands of the small models: their scale, and which methods and tasks."""
    parser.add_argument("--scale", default="mini", help="mini: the plans are of the small models")
    parser.add_argument("--methods", help="only these, comma-separated")
    parser.add_argument("--tasks", help="only these, comma-separated")


def check_small(options: argparse.Namespace, refusal: str) -> None:
    """Check `--scale` and `--workers` of a command that has only the small models.

    Raises:
        UserError: for a wrong value, or with `refusal` for the paper's scale.
    """
    check_choice("SCALE", options.scale, SCALES)
    check_integer("WORKERS", options.workers, at_least=1)
    if options.scale != "mini":
        raise UserError(refusal)


def last_wins(overrides: Sequence[str]) -> tuple[str, ...]:
    """Drop overrides that a later one repeats, which Hydra refuses for groups."""
    return tuple({one.partition("=")[0]: one for one in overrides}.values())


def carried(overrides: Iterable[str], *more: str) -> list[str]:
    """The `ARGS` of a `make` command that a message names: the overrides of the present call, and `more`."""
    replaced = {key_of(one) for one in more}
    kept = [one for one in overrides if key_of(one) not in replaced and not one.startswith("hydra.")]
    return [*(one for one in kept if one != "results_dir=results"), *more]


def split_names(text: str | None) -> tuple[str, ...]:
    """The names of a comma-separated option, each once; none without it."""
    return tuple(dict.fromkeys(one.strip() for one in text.split(",") if one.strip())) if text else ()
