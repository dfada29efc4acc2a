"""Where the packages of an extra are missing, every command names the package and the extra, in one line."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from run_fixtures import ROOT, environment

from sparsegrad import __version__, extras
from sparsegrad.cli.console import main
from sparsegrad.extras import explain_missing, find_extra, install_command

SWEEP = ("matplotlib", "optuna", "optuna_dashboard", "plotly", "psycopg", "jinja2", "tabulate")
CORE = (
    *SWEEP, "accelerate", "datasets", "evaluate", "huggingface_hub", "hydra", "omegaconf", "pandas", "peft",
    "psutil", "yaml", "rich", "sklearn", "scipy", "tqdm", "transformers",
)  # fmt: skip
ALL = (*CORE, "filelock", "numpy", "safetensors", "torch")  # as without the environment
_BLOCK = """import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Finder())
"""
CONSOLE = str(Path(sys.executable).with_name("sparsegrad"))


def run_without(missing: tuple[str, ...], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command where packages are missing: by Python itself, since the quick one has imported them."""
    (folder / "sitecustomize.py").write_text(_BLOCK.format(blocked=set(missing)))
    there = environment(PYTHONPATH=str(folder))
    return subprocess.run(words, cwd=ROOT, env=there, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("missing", "words", "package", "extra"),
    [
        (ALL, (sys.executable, "run.py"), "safetensors", "run"),
        (ALL, (sys.executable, "-m", "experiments.report"), "safetensors", "report"),
        (CORE, (sys.executable, "run.py", "--help"), "hydra-core", "run"),
        (CORE, (sys.executable, "-m", "sparsegrad.cli", "records", "--help"), "hydra-core", "run"),
        (CORE, (CONSOLE, "report"), "matplotlib", "report"),
        (CORE, (sys.executable, "-m", "sparsegrad.sweeps", "list"), "rich", "sweep"),
        (SWEEP, (CONSOLE, "report"), "matplotlib", "report"),
        (SWEEP, (sys.executable, "-m", "experiments.compare", "--help"), "optuna", "report"),
    ],
)
def test_a_command_names_the_extra(
    missing: tuple[str, ...], words: tuple[str, ...], package: str, extra: str, tmp_path: Path
) -> None:
    if words[0] == CONSOLE and not Path(CONSOLE).is_file():
        pytest.skip("the package is not installed")
    ended = run_without(missing, tmp_path, *words)
    assert ended.returncode == 2, ended.stderr
    remedy = f"run pip install -e '.[{extra}]' in the checkout of sparsegrad"
    assert ended.stderr.splitlines()[-1] == f"error: this command needs the package {package}: {remedy}"
    assert "Traceback" not in ended.stderr


def test_the_list_of_commands_needs_no_extra(tmp_path: Path) -> None:
    helped = run_without(CORE, tmp_path, sys.executable, "-m", "sparsegrad.cli", "--help")
    assert helped.returncode == 0, helped.stderr
    assert "records" in helped.stdout


def test_the_command_has_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sparsegrad {__version__}\n"


def test_the_extras_come_from_the_metadata_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["optuna>=5; extra == 'sweep'", 'Huggingface_Hub>=1.3; extra == "run"', "torch>=2.6"]
    names += ['sparsegrad-peft[run]; extra == "sweep"', 'sparsegrad-peft[joblib,sweep]; extra == "report"']
    monkeypatch.setattr(extras, "requires", lambda _: names)
    assert find_extra("huggingface-hub", "run") == "run"
    assert find_extra("huggingface-hub", "report") == "report"
    assert find_extra("optuna", "run") == "sweep"
    assert find_extra("torch", "run") == "run", "a Python without it can find the metadata in the checkout"
    assert find_extra("mine", "run") is None


def test_another_python_is_told_to_activate_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    monkeypatch.setattr(extras, "_is_installed", lambda _: False)
    packages = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    (packages / "sklearnex").mkdir(parents=True)
    assert "pip install" in str(explain_missing(missing)), "that environment does not have it either"
    (packages / "sklearn").mkdir()
    assert "scikit-learn: run `. .venv/bin/activate` in the checkout" in str(explain_missing(missing))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert "pip install" in str(explain_missing(missing))


def test_a_module_of_no_extra_is_no_users_mistake() -> None:
    assert explain_missing(ModuleNotFoundError("No module named 'sparsegrad.gone'", name="sparsegrad.gone")) is None
    assert explain_missing(ModuleNotFoundError("no name")) is None
    assert explain_missing(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    newer = "transformers.models.of_a_newer_version"
    assert explain_missing(ModuleNotFoundError(f"No module named {newer!r}", name=newer)) is None


def test_a_checkout_that_was_not_installed_reads_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", refuse)
    assert find_extra("hydra-core", "run") == "run"
    assert find_extra("torch", "run") == "run"
    assert find_extra("optuna", "run") == "sweep"
    assert find_extra("mine", "run") is None


def test_a_wheel_is_not_told_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    assert install_command("run") == "pip install 'sparsegrad-peft[run]'"
