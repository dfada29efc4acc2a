"""Which extra installs a package that is missing: one line for what would be a ModuleNotFoundError.

Without imports of third parties, so that it works wherever `sparsegrad` is imported.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

PROJECT = "sparsegrad-peft"
ROOT = Path(__file__).parents[1]  # of the checkout, where this is one
_EXTRA = re.compile(r"""(?P<name>[\w.-]+)(?:\[(?P<extras>[^]]*)\])?.*extra == ["'](?P<extra>[^"']+)["']""")
# Modules whose package has another name.
_PACKAGES = {
    "google": "protobuf", "grpc": "grpcio", "hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml",
}  # fmt: skip
# What all of a part of the project needs, so that one installation is enough; `run` is for what is not listed.
_NEEDS = {
    "sparsegrad.sweeps": "sweep", "experiments.bench": "run", "experiments.mtbench": "judge", "experiments": "report",
}  # fmt: skip


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """The package that is missing and the extra to install; None where no extra has it, which is no user's mistake."""
    if not error.name or _is_installed(error.name.partition(".")[0]):  # a module that this version does not have
        return None
    package = _find_package(error.name)
    wanted = _find_need(error.__traceback__)
    extra = find_extra(package, wanted)
    if extra is None:
        return None
    remedy = _activate_command(error.name.partition(".")[0]) or install_command(extra)
    return f"this command needs the package {package}: run {remedy}"


def find_extra(package: str, wanted: str) -> str | None:
    """`wanted` if it installs the package, otherwise the first extra that does; None where none does."""
    extras = _read_extras(_list_requirements())
    return next((name for name in (wanted, *extras) if package in _walk(name, extras)), None)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
    except ValueError:  # it is loaded, without a specification
        return True


def _list_requirements() -> list[str]:
    """The requirements of the distribution; of a checkout that was not installed, those that its file names.

    Those of no extra count as `run`'s, which brings them too. Any Python that runs in a checkout finds the metadata of
    the distribution there, once another one installed it, but none of the packages.
    """
    try:
        found = requires(PROJECT) or []
    except PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"].items()
        found = [*project["dependencies"], *(f"{one}; extra == '{extra}'" for extra, few in extras for one in few)]
    return [one if _EXTRA.match(one) else f"{one}; extra == 'run'" for one in found]


def _activate_command(module: str) -> str | None:
    """What activates the checkout's environment, in words, where that has the module and another Python is running."""
    own = ROOT / ".venv"
    if Path(sys.prefix).resolve() == own.resolve():
        return None
    files = (path.stem for path in own.glob(f"lib/python3*/site-packages/{module}*"))
    return "`. .venv/bin/activate` in the checkout of sparsegrad, whose environment has it" if module in files else None


def install_command(extra: str) -> str:
    """What installs an extra, in words."""
    if (ROOT / "pyproject.toml").is_file():
        return f"pip install -e '.[{extra}]' in the checkout of sparsegrad"
    return f"pip install '{PROJECT}[{extra}]'"  # of the wheel that is installed, pip needs no copy for this


def _find_package(module: str | None) -> str:
    first = (module or "").partition(".")[0]
    return _PACKAGES.get(first, _normalize(first))


def _find_need(trace: TracebackType | None) -> str:
    """The extra of the part of the project that the command is, which is the outermost part in the traceback."""
    while trace is not None:
        part = trace.tb_frame.f_globals.get("__package__") or ""
        for name, extra in _NEEDS.items():
            if part == name or part.startswith(f"{name}."):
                return extra
        trace = trace.tb_next
    return "run"


def _read_extras(requirements: list[str]) -> dict[str, set[str]]:
    """Extra -> its packages, and `PROJECT[other]` for the extras that it includes."""
    extras: dict[str, set[str]] = {}
    for found in filter(None, map(_EXTRA.match, requirements)):
        name = _normalize(found["name"])
        parts = {f"{name}[{one.strip()}]" for one in found["extras"].split(",")} if name == PROJECT else {name}
        extras.setdefault(found["extra"], set()).update(parts)
    return extras


def _walk(extra: str, extras: dict[str, set[str]]) -> Iterator[str]:
    """All packages of an extra, with those of the extras that it includes."""
    for one in extras.get(extra, ()):
        if one.startswith(f"{PROJECT}["):
            yield from _walk(one[len(PROJECT) + 1 : -1], extras)
        else:
            yield one


def _normalize(name: str) -> str:
    """As on PyPI: `huggingface_hub` and `Huggingface-Hub` are one name."""
    return re.sub(r"[-_.]+", "-", name).lower()
