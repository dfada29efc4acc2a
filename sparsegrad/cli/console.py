"""The command `sparsegrad`: runs, their records, sweeps and assets under one name."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sparsegrad import __version__
from sparsegrad.cli.screen import replace_unprintable
from sparsegrad.errors import UserError, did_you_mean, run_as_command

ROOT = Path(__file__).parents[2]  # of the checkout, where this is one
# Command -> the module that it runs, and its line of help. All words after the command are the module's.
MODULES = {
    "sweeps": ("sparsegrad.sweeps", "inspect the studies of sweeps: list, show, address"),
    "assets": ("sparsegrad.assets", "fetch pinned models and data, or list them"),
    "report": ("experiments.report", "rebuild tables, figures and the page of results/"),
    "compare": ("experiments.compare", "compare methods, tuned and over several seeds"),
}
_RUN = "fine-tune: the same as python run.py (sparsegrad run --help)"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status is that of the command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    replace_unprintable()
    return run_as_command(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["run"]:
        return _run_script(_find_checkout() / "run.py", words[1:])
    if words and words[0] in MODULES:
        return _run_module(words[0], words[1:])
    if not words:
        make_parser().print_help()
        return 2
    if words[0] != "records" and not words[0].startswith("-"):
        if not Path(words[0]).is_dir():
            known = ("run", "records", *MODULES)
            hint = did_you_mean(words[0], known, "sparsegrad ") or f"choose one of {', '.join(known)}"
            raise UserError(f"sparsegrad {words[0]} is not a command: {hint}")
        words = ["records", *words]  # `python -m sparsegrad.cli FOLDER`, as it was called before
    options = make_parser(with_records=words[0] == "records").parse_args(words)
    return int(options.do(options))


def make_parser(with_records: bool = False) -> argparse.ArgumentParser:
    """The parser of the commands; those of `MODULES` and `run` read their own words.

    Args:
        with_records: with the options of `records`, which need the extra `run`; the list of commands needs none.
    """
    parser = argparse.ArgumentParser(
        prog="sparsegrad",
        description="SparseGrad: fine-tune with few trainable MLP weights, and look at the results.",
        epilog="sparsegrad COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"sparsegrad {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("run", help=_RUN)
    about = "the records below a folder as a table"
    records = commands.add_parser("records", help=about, description=f"Show {about}.")
    if with_records:
        from sparsegrad.cli.records_command import add_options

        add_options(records)
    for name, (_, text) in MODULES.items():
        commands.add_parser(name, help=text)
    return parser


def _find_checkout() -> Path:
    """The folder with run.py and conf/.

    Raises:
        UserError: where the package is installed without its checkout, as a wheel is.
    """
    for folder in (ROOT, Path.cwd()):
        if (folder / "run.py").is_file() and (folder / "conf" / "config.yaml").is_file():
            return folder
    raise UserError(
        "sparsegrad run needs run.py and conf/ of the checkout, which a wheel does not have: change to the checkout, "
        "or install with pip install -e '.[run]' there"
    )


def _run_script(path: Path, words: list[str]) -> int:
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")
    return 0


def _run_module(command: str, words: list[str]) -> int:
    module = MODULES[command][0]
    if module.startswith("experiments.") and not _is_there("experiments"):
        sys.path.insert(0, str(ROOT))  # the console script has its own folder in front, not the checkout
    if not _is_there(module):
        raise UserError(
            f"sparsegrad {command} needs {module}, which is part of the checkout and not of a wheel: change to a "
            "checkout that has it"
        )
    sys.argv = [f"sparsegrad {command}", *words]
    runpy.run_module(module, run_name="__main__", alter_sys=False)
    return 0


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
