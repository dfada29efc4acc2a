"""Every command of README.md, CONTRIBUTING.md and docs/ is right, as far as that shows without running it."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator

import pytest
from hydra.errors import HydraException
from run_fixtures import ROOT, Composer

from experiments.reproduce.cells import experiments_of
from sparsegrad.cli.console import MODULES, make_parser
from sparsegrad.errors import UserError
from sparsegrad.runs.config import build
from sparsegrad.runs.names import with_one_amount
from sparsegrad.runs.overrides import expand_aliases
from sparsegrad.sweeps import hparams
from sparsegrad.sweeps.config import make_plan

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# `sparsegrad keep=5500` in a text is a setting of a method, not a command.
PROGRAMS = r"(?:python|pip|make|torchrun|accelerate|sbatch|sparsegrad(?= [a-z]+(?: |$)))"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )?(?:\.venv/bin/)?{PROGRAMS} \S.*", re.DOTALL)
RUN = re.compile(r"(run\.py|scripts/slurm/\S+)((?: [^\"]*)?)")  # run.py, or a script that hands its arguments on to it
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

Check = Callable[[str], None]


def commands() -> Iterator[str]:
    """Lines of shell blocks and inline code; continued lines joined, comments dropped, placeholders filled in."""
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line.partition(" #")[0] for block in blocks for line in block.replace("\\\n", "").splitlines()]
        lines += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        for command in (" ".join(part.split()) for line in lines for part in line.split(" && ")):
            if COMMAND.fullmatch(command):
                yield re.sub(r"\bPID\b", "1", re.sub(r"<[^>]*>", "placeholder", command))


@pytest.fixture
def check(conf: Composer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """`check(command)`: fails or raises where the command would be refused."""

    def checked(command: str) -> None:
        words = shlex.split(command)
        program = words[0].removeprefix(".venv/bin/")
        if run := RUN.search(command):
            assert (ROOT / run[1]).is_file()
            check_run(shlex.split(run[2].replace("--cfg job", "")), conf)
        elif words[:2] == [words[0], "-m"]:
            monkeypatch.setattr(sys, "argv", [*words[2:], "--help"])
            check_module(words[2], [word for word in words if word.startswith("--")], capsys)
        elif program == "make":
            check_target(*[word for word in words[1:] if "=" not in word])
        elif program == "sparsegrad":
            check_console(words[1:], conf)
        elif program == "pip" and "-e" in words:
            assert set(re.findall(r"[a-z]+", words[-1])) <= EXTRAS.keys()
        elif program == "python":
            assert (ROOT / words[1]).is_file()

    return checked


def check_run(words: list[str], conf: Composer) -> None:
    """Compose and build what run.py would; of a multirun the first job."""
    given = [word for word in words if not word.startswith("-") and "..." not in word]
    if "-m" in words:
        given = [re.sub(r"range\(\d+\)", "0", word) for word in given]
        given = [word if "[" in word else word.split(",")[0] for word in given]
    given = expand_aliases(given)
    composed = with_one_amount(conf(*given), {word.partition("=")[0] for word in given})
    if composed.hparams is not None and not composed.hparams.startswith(hparams.STUDY):
        hparams.apply(composed, {word.partition("=")[0] for word in given})
    if composed.get("sweep") is None:
        build(composed)
    else:
        make_plan(composed)


def check_console(words: list[str], conf: Composer) -> None:
    """A command of `sparsegrad` with its options."""
    if words[0] == "run":
        check_run([word for word in words[1:] if word != "--help"], conf)
    elif words[0] in MODULES:
        assert importlib.util.find_spec(MODULES[words[0]][0]) is not None
    else:
        make_parser(with_records=True).parse_args(words)


def check_module(module: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Its help, which argparse prints after it has checked the arguments before `--help`, names all options."""
    assert importlib.util.find_spec(module) is not None
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert [option for option in options if option not in shown] == []


def check_target(target: str) -> None:
    """A target of the Makefile, or a table that `reproduce-%` knows."""
    table = target.removeprefix("reproduce-")
    if table == "TABLE":  # stands for all of them
        return
    if table == target:
        assert target in TARGETS
    else:
        experiments_of(table, "paper")  # raises for an unknown name


def test_make_help_lists_every_target_in_80_columns() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert max(map(len, shown.splitlines())) <= 80
    listed = set(re.findall(r"^  make ([a-z-]+)(?=  )", shown, re.MULTILINE))
    assert listed == TARGETS


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_of_the_pages_is_right(command: str, check: Check) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "python run.py model=robertabase task=cola",
        "python run.py hparams=paper model=roberta_base task=cola method=lora",
        "python run.py sweep=quick sweep.sampler=best",
        "python -m experiments.run table4",
        "python -m experiments.bench --no-such-option",
        "python scripts/bench.py",
        "make reproduce-table99",
        "make quick",
        "sparsegrad recrods outputs",
        "sparsegrad records --sorted score",
        "pip install -e '.[everything]'",
    ],
)
def test_a_wrong_command_is_noticed(command: str, check: Check) -> None:
    with pytest.raises((AssertionError, UserError, HydraException, SystemExit)):
        check(command)
