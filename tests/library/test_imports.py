"""The structure of the code: who may import whom, and that the library loads none of the extras."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from source_imports import imported_names

ROOT = Path(__file__).parents[2]
# From the ground up; a row may import itself and all rows above it in this list. `tasks` and `metrics` see each other.
ORDER = (
    ("namesake", "extras", "interrupt", "sparse_product"),
    ("errors", "hashing", "precision", "bits", "threads"),
    ("arguments", "files", "progress", "distributed", "device"),
    ("basis",),
    ("targets_errors",),
    ("targets_blocks",),
    ("targets",),
    ("optim",),
    ("layers",),
    ("calibration",),
    ("adapter", "api"),
    ("assets",),
    ("tasks", "metrics"),
    ("methods",),
    ("trainer",),
    ("models",),
    ("runs",),
    ("sweeps",),
    ("cli",),
    ("experiments.paths", "experiments.palette", "experiments.labels"),
    ("experiments.published",),
    ("experiments.bench", "experiments.mtbench", "experiments.studies"),
    ("experiments.report",),
    ("experiments.reproduce",),
    ("experiments.compare",),
    ("experiments.reliability",),
)
LEVEL = {name: level for level, row in enumerate(ORDER) for name in row}
NEVER = (
    "torch._dynamo", "psutil", "hydra", "omegaconf", "transformers", "datasets", "peft", "pandas", "scipy", "optuna",
    "tensorly",
)  # fmt: skip


def package_of(module: str) -> str:
    """`sparsegrad.optim.adamw` -> `optim`; `experiments.bench.arms` -> `experiments.bench`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sparsegrad" else ".".join(parts[:2])


def imports(path: Path) -> list[str]:
    return [name for name in imported_names(path) if name.startswith(("sparsegrad.", "experiments."))]


def modules() -> list[Path]:
    found = [path for top in ("sparsegrad", "experiments") for path in sorted((ROOT / top).rglob("*.py"))]
    return [path for path in found if path.relative_to(ROOT).as_posix() not in ("sparsegrad/__init__.py",)]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down_only(path: Path) -> None:
    own = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    if path.is_relative_to(ROOT / "sparsegrad"):
        loose = [name for name in imports(path) if package_of(name) not in (*LEVEL, "__version__")]
        assert not loose, f"import {loose} from the modules that define them, whose level is known"
    wrong = [name for name in imports(path) if LEVEL.get(package_of(name), 0) > LEVEL.get(own, 0)]
    beside = [
        name
        for name in imports(path)
        if package_of(name) != own and LEVEL.get(package_of(name)) == LEVEL.get(own) and own in ("adapter", "api")
    ]
    assert not wrong + beside, f"{own} must not import {wrong + beside}"


def test_every_module_has_its_place() -> None:
    tops = {path.stem for path in (ROOT / "sparsegrad").glob("*.py")} | {
        path.parent.name for path in (ROOT / "sparsegrad").glob("*/__init__.py")
    }
    tops |= {f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("*.py")} | {
        f"experiments.{path.parent.name}" for path in (ROOT / "experiments").glob("*/__init__.py")
    }
    assert tops - {"__init__", "experiments.__init__"} == LEVEL.keys()


def test_the_library_loads_none_of_the_extras() -> None:
    code = f"import sparsegrad, sys; print([name for name in {NEVER} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_shares_its_name_with_a_function_of_its_package() -> None:
    """`sparsegrad.prepare` was once a function that hid the module of that name."""
    clashes = []
    for path in modules():
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        siblings = {one.stem for one in path.parent.glob("*.py")} | {
            one.name for one in path.parent.iterdir() if (one / "__init__.py").is_file()
        }
        clashes += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(names & siblings)]
    assert clashes == []
