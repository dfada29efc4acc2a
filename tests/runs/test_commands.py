"""Every command of README.md, CONTRIBUTING.md and docs/ works as far as it can be checked without running it."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator

import pytest
from run_fixtures import ROOT, Composer

from experiments.reproduce.cells import experiments_of
from sparsegrad.errors import UserError
from sparsegrad.runs.config import build
from sparsegrad.sweeps import hparams
from sparsegrad.sweeps.config import make_plan

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )?(?:\.venv/bin/)?(?:python|pip|make|torchrun|accelerate|sbatch) \S.*", re.DOTALL)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands() -> Iterator[str]:
    """Lines of shell blocks and inline code, with placeholders filled in and continued lines joined."""
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
        lines += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        for part in (part.strip() for line in lines for part in re.split(r" && |; ", line)):
            if COMMAND.fullmatch(part):
                yield re.sub(r"\bPID\b", "1", re.sub(r"<[^>]*>", "placeholder", " ".join(part.split())))


def check(command: str, conf: Composer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fail or raise if `command` would be refused."""
    words = shlex.split(command, comments=True)
    if run := re.search(r"(?:run\.py|(scripts/slurm/\S+))( [^\"]*)?", command):
        assert run[1] is None or (ROOT / run[1]).is_file()
        check_run(shlex.split(run[2] or "", comments=True), conf)
    elif "-m" in words and words[0].endswith("python"):
        check_module(words[words.index("-m") + 1], words[words.index("-m") + 2 :], monkeypatch, capsys)
    elif words[0].endswith("python"):
        assert (ROOT / words[1]).is_file()
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and "*" not in word]
        for target in targets:
            name = target.removeprefix("reproduce-")
            assert target in TARGETS or (name != target and experiments_of(name, "paper") is not None)
    elif words[0] == "pip" and "-e" in words:
        assert set(re.findall(r"[a-z]+", words[-1])) <= EXTRAS.keys()


def check_run(words: list[str], conf: Composer) -> None:
    """Compose and build what run.py would; of a multirun the first job."""
    given = [word for word in words if not word.startswith("-") and "..." not in word]
    if "-m" in words:
        given = [re.sub(r"range\(\d+\)", "0", word) for word in given]
        given = [word if "[" in word else word.split(",")[0] for word in given]
    composed = conf(*given)
    if composed.hparams is not None and not composed.hparams.startswith(hparams.STUDY):
        hparams.apply(composed, {word.partition("=")[0] for word in given})
    if composed.get("sweep") is None:
        build(composed)
    else:
        make_plan(composed)


def check_module(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module's help, which argparse shows after it has checked the arguments before it, names all their options."""
    assert importlib.util.find_spec(module) is not None
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert [word for word in arguments if word.startswith("--") and word not in shown] == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_of_the_pages_is_right(
    command: str, conf: Composer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(command, conf, monkeypatch, capsys)


@pytest.mark.parametrize(
    "command",
    [
        "python run.py model=robertabase task=cola",
        "python run.py hparams=paper model=roberta_base task=cola method=lora",
        "python run.py sweep=quick sweep.pruner=none sweep.sampler=best",
        "python -m experiments.run table4",
        "python -m experiments.bench --no-such-option",
        "make reproduce-table99",
        "make quick",
        "pip install -e '.[everything]'",
    ],
)
def test_a_wrong_command_is_noticed(
    command: str, conf: Composer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.errors import HydraException

    with pytest.raises((AssertionError, UserError, HydraException)):
        check(command, conf, monkeypatch, capsys)
