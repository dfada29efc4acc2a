"""Inspect sweeps: `python -m sparsegrad.sweeps show STUDY`, `list`, `address`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sparsegrad.errors import UserError, missing_package, run_as_command

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 2 after one line about a mistake of the user, or 130 after Ctrl-C.
    """
    options = _make_parser().parse_args(arguments)
    return run_as_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    # The commands import Optuna themselves, so that a missing one is reported in one line.
    try:
        options.do(options)
    except ModuleNotFoundError as error:
        raise missing_package("a sweep", error.name, "sweep") from None


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsegrad.sweeps", description="Inspect sweeps.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="best trial, counts, table of trials, plots")
    show.add_argument("study")
    show.add_argument("--out", type=Path, help="folder for trials.csv and plots; default: beside the default storage")
    show.set_defaults(do=_show_study)
    for name, do, text in (
        ("list", _list_studies, "the studies of a storage"),
        ("address", _print_address, "the storage's address for optuna-dashboard, password included"),
    ):
        commands.add_parser(name, help=text).set_defaults(do=do)
    for command in commands.choices.values():
        command.add_argument("--storage", help="as sweep.storage; default: SPARSEGRAD_STORAGE or the results folder")
        command.add_argument("--results-dir", default="outputs", help="as results_dir; default: %(default)s")
    return parser


def _find_storage(options: argparse.Namespace) -> str:
    """Return `--storage`, or the storage that a sweep uses by default."""
    from sparsegrad.sweeps.hparams import default_storage

    return options.storage or default_storage(options.results_dir)


def _show_study(options: argparse.Namespace) -> None:
    from sparsegrad.sweeps.show import export, write_plots
    from sparsegrad.sweeps.study import load_study

    study = load_study(_find_storage(options), options.study)
    folder = options.out or Path(options.results_dir) / "studies" / options.study
    console.print_json(json.dumps(export(study, folder)))
    for path in write_plots(study, folder):
        console.print(str(path), markup=False, soft_wrap=True)


def _list_studies(options: argparse.Namespace) -> None:
    import optuna

    from sparsegrad.sweeps.storage import FIRST_SWEEP, open_existing_store

    store = open_existing_store(_find_storage(options))
    studies = optuna.get_all_study_summaries(store.storage)
    if not studies:
        raise UserError(f"{store.address} has no study yet: {FIRST_SWEEP}")
    width = max(len("study"), *(len(one.study_name) for one in studies))
    print(f"{'study':<{width}}  trials  best")
    for one in studies:
        best = "-" if one.best_trial is None else f"{one.best_trial.value:.4f}"
        print(f"{one.study_name:<{width}}  {one.n_trials:>6}  {best}")


def _print_address(options: argparse.Namespace) -> None:
    from sparsegrad.sweeps.storage import dashboard_address, open_existing_store

    open_existing_store(_find_storage(options))
    print(dashboard_address(_find_storage(options)))


if __name__ == "__main__":
    sys.exit(main())
