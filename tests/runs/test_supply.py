"""What the project declares about its dependencies holds together: bounds, lock, and the files of a wheel."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from run_fixtures import ROOT
from source_imports import imported_names

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OTHER_NAMES = {"hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml"}
OF_OTHERS = {"pyarrow": "datasets", "sqlalchemy": "optuna", "markupsafe": "jinja2"}  # package -> what requires it
OF_RUNS = {"assets", "cli", "methods", "metrics", "models", "runs", "sweeps", "tasks", "trainer"}
OPTIONAL = {"huggingface_hub", "scipy", "tensorly"}  # where they are missing, the library does without or names them
LOCKED = {
    canonicalize_name(name): version
    for name, version in (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needed(lines: list[str], extras: frozenset[str] = frozenset()) -> Iterator[Requirement]:
    """Requirements that apply here, with the project's own extras spelled out."""
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        if requirement.name == PROJECT["name"]:
            yield from needed([line for extra in requirement.extras for line in EXTRAS[extra]])
        else:
            yield requirement


def packages_of(paths: Iterable[Path]) -> set[str]:
    """The packages of others that these files import, wherever in them."""
    names = {name.partition(".")[0] for path in paths for name in imported_names(path)}
    return {OTHER_NAMES.get(name, name) for name in names - sys.stdlib_module_names - {"sparsegrad", "experiments"}}


def closure(lines: list[str]) -> dict[str, str]:
    """Name -> version of everything installed that `lines` bring, over all levels; docs' packages may be absent."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(needed(lines))
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = distribution.version.split("+")[0]
        waiting += needed(distribution.requires or [], extras)
    return found


def test_the_lock_names_all_that_an_installation_brings() -> None:
    if any(metadata.version(one.name).split("+")[0] != LOCKED[one.name] for one in needed(PROJECT["dependencies"])):
        pytest.skip("of an installation with other versions, as of `make test-lowest`")
    brought = closure([*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["docs"]])
    assert {"torch", "pytest", "antlr4-python3-runtime"} <= brought.keys()
    of_cuda = ("nvidia-", "cuda-", "triton")
    assert {name for name in brought.keys() - LOCKED.keys() if not name.startswith(of_cuda)} == set()


def test_every_package_that_the_library_imports_is_a_dependency_or_optional() -> None:
    """Otherwise nobody bounds its version: filelock was left to torch, and with old ones no adapter could be saved."""
    packages = packages_of(path for path in (ROOT / "sparsegrad").rglob("*.py") if not OF_RUNS & {*path.parts})
    assert packages - OPTIONAL == {requirement.name for requirement in needed(PROJECT["dependencies"])}


@pytest.mark.parametrize("folder", ["sparsegrad", "experiments", "scripts"])
def test_every_package_that_is_imported_is_declared_or_comes_with_one_that_is(folder: str) -> None:
    packages = packages_of((ROOT / folder).rglob("*.py"))
    declared = {requirement.name for requirement in needed([*PROJECT["dependencies"], *EXTRAS["dev"]])}
    assert "torch" in packages
    assert packages - declared <= OF_OTHERS.keys()
    for package in packages - declared:
        required = map(Requirement, metadata.requires(OF_OTHERS[package]) or [])
        assert package in {canonicalize_name(one.name) for one in required if one.marker is None}


@pytest.mark.parametrize("extra", ["", "dev", "docs"])
def test_the_lock_lies_within_the_bounds(extra: str) -> None:
    for requirement in needed(EXTRAS[extra] if extra else PROJECT["dependencies"]):
        assert requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)]), requirement


def test_lowest_takes_every_bound_and_a_pin_instead() -> None:
    lines = script("lowest").lowest(["llama"], {"torch": "9.9"})
    assert [line.split("==")[0] for line in lines] == sorted(
        {requirement.name for requirement in needed([*PROJECT["dependencies"], *EXTRAS["llama"]])}
    )
    assert "safetensors==0.8" in lines, "the extra's own bound, which is higher than the library's"
    assert "torch==9.9" in lines
    bounds = dict(line.split("==") for line in lines)
    for line in PROJECT["dependencies"]:
        if Requirement(line).name not in ("torch", "safetensors"):
            assert line == f"{Requirement(line).name}>={bounds[Requirement(line).name]}"


def test_lowest_refuses_a_dependency_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("lowest")
    monkeypatch.setitem(EXTRAS, "open", ["numpy"])
    monkeypatch.setattr(module.tomllib, "loads", lambda _: {"project": PROJECT})
    with pytest.raises(SystemExit, match="no lower bound in numpy: write name>=version"):
        module.lowest(["open"], {})


def test_lock_leaves_out_the_project_and_what_only_a_cuda_build_brings() -> None:
    def entry(name: str, version: str, **info: Any) -> dict[str, Any]:
        return {"metadata": {"name": name, "version": version}, "download_info": info}

    report = [
        entry("torch", "2.0+cpu"),
        entry("nvidia-cublas", "1"),
        entry("Jinja2", "3"),
        entry("own", "1", dir_info={}),
    ]
    assert script("lock").lock({"install": report}) == ["Jinja2==3", "torch==2.0"]


def test_the_docs_name_the_bounds_and_pythons_of_the_project() -> None:
    """docs/versions.md has a row per direct dependency of the library and of the extra `run`: bound, lock."""
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    declared = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS["run"]]]
    assert sorted(rows) == sorted(
        (one.name, str(one.specifier).removeprefix(">="), LOCKED[canonicalize_name(one.name)]) for one in declared
    )
    assert PROJECT["requires-python"] == ">=3.11"
    assert "Python 3.11 or newer" in page


def test_every_file_of_the_package_that_is_not_python_is_package_data() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    declared = {
        path for package, names in settings.items() for name in names
        for path in (ROOT / package.replace(".", "/")).glob(name)
    }  # fmt: skip
    files = {path for path in (ROOT / "sparsegrad").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert declared == files


def test_an_editable_installation_is_found_from_the_folder_above_its_checkout(tmp_path: Path) -> None:
    """`git clone` calls the checkout sparsegrad, which Python could take for a package without __init__.py."""
    checkout, packages = tmp_path / "sparsegrad", tmp_path / "site-packages"
    shutil.copytree(ROOT / "sparsegrad", checkout / "sparsegrad", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, cwd=checkout)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(packages)
    for folder in (checkout, tmp_path):
        (folder / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").touch()
    find = f"import site; site.addsitedir({str(packages)!r}); from importlib.util import find_spec; "
    find += "print(find_spec('sparsegrad').origin, find_spec('experiments.mine') is not None)"
    # Without the packages of this Python, among which is sparsegrad.
    found = subprocess.run([sys.executable, "-S", "-c", find], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.split() == [str(checkout / "sparsegrad" / "__init__.py"), "True"]
    others = {path.parent for path in ROOT.glob("*/__init__.py")} - {ROOT / "sparsegrad"}
    assert not others, "they would hide folders of the same name"


def test_the_wheel_trains_saves_and_loads_without_the_checkout(tmp_path: Path) -> None:
    """`make test-wheel` does the same in a fresh environment; here the extras are only kept from being imported."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "sparsegrad", source / "sparsegrad", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, *build], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("sparsegrad_peft-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sparsegrad/sweeps/published/paper.csv" in names
    assert not [name for name in names if name.startswith(("experiments", "tests", "conf"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "import runpy, sys; sys.modules.update(dict.fromkeys(('transformers', 'hydra', 'peft', 'datasets')))"
    code += f"; runpy.run_path({str(ROOT / 'scripts' / 'smoke.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "both engines trained, saved and loaded" in done.stdout
