"""The runs that a table needs: each YAML of conf/experiment spans a grid of cells with its sweeper parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.paths import CONF, SCALES
from sparsegrad.errors import UserError, check_choice
from sparsegrad.runs.composing import compose_run, read_sweep
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.overrides import expand_aliases, explain, key_of
from sparsegrad.runs.records import read_record
from sparsegrad.sweeps import hparams
from sparsegrad.sweeps.search_results import KEY, SearchMissingError

Stamp = tuple[int, int]
"""What tells a record from the one that replaces it, which is a new file."""

# Scale -> table -> experiment YAMLs. The mini tables share their runs: one small model replaces all of the paper's.
EXPERIMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "paper": {name: (name,) for name in ("table4", "table5", "table6", "table9", "table10", "table11", "table12")}
    | {"ablation": ("table11", "table12"), "all": ("table4", "table5", "table6", "table11", "table12")},
    # Their rates come from searches (hparams=search): `make search SCALE=mini` is to be called before.
    "mini": dict.fromkeys(("table4", "table5", "table9", "table10", "quality"), ("evidence_paper",))
    | dict.fromkeys(("table11", "table12", "ablation"), ("evidence_density",))
    | {"table6": ("table6_mini", "table6_mini_bases"), "basis": ("evidence_basis",)}
    | {"all": ("evidence_paper", "evidence_density", "evidence_basis", "table6_mini", "table6_mini_bases")},
}
# Experiments on conversations, which read TREES where the others read DATA.
OF_TREES = ("table6", "table6_mini", "table6_mini_bases")
# Grid of experiments whose YAML has none.
GRID = {"seed": "42,3705,2023", "method": "full,lora,sparsegrad,meprop"}
# Data that `experiments.studies.gradients` measures.
MEASURED = {
    "figure2": ("figure2",),
    "figure3": ("figure3",),
    "basis": ("basis",),
    "quality": ("energy",),
    "all": ("figure2", "figure3", "basis", "energy"),
}
# Names without runs of cells, and why.
ELSEWHERE = {
    "figure1": "a drawing: no runs",
    "table1": "counted on the architectures: no runs",
    "table2": "checked by number: no runs",
    "table3": "measured by the benchmark, preset paper, the same at both scales",
    "table6": "LLaMA-2-7B on OASST1; the table lists what is missing",
    "table7": "measured by the benchmark, preset paper, the same at both scales",
    "table8": "measured by the benchmark, preset paper, the same at both scales",
    **{f"table{n}": "searched by sweeps, one study per task" for n in (13, 14, 15)},
    "section8": "measured by the benchmark, preset decomposition, the same at both scales",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a table.

    Attributes:
        experiment: name of its YAML.
        point: values of the sweeper parameters, such as method and seed.
        overrides: overrides for run.py, besides `experiment=`.
        config: the composed and checked configuration.
        hparams: what its record will say about the source of its hyperparameters; None without one.
        waits: why its search gives no rate yet, so that its record is not known either; None if it has its rate.
        uncounted: stamp of its complete record, if no table counts it, so that it is made again; else None.
    """

    experiment: str
    point: dict[str, str]
    overrides: tuple[str, ...]
    config: RunConfig
    hparams: Mapping[str, Any] | None = None
    waits: SearchMissingError | None = None
    uncounted: Stamp | None = None

    @property
    def label(self) -> str:
        """Name of the cell in messages."""
        return " ".join(self.point.values())

    @property
    def takes_data(self) -> bool:
        """Whether its task reads what `DATA` names."""
        return reads_folder(self.config.task.name)

    def record(self) -> dict[str, Any] | None:
        """Its record, or None; one that cannot be read counts as none: the next run replaces it, or says why not."""
        if self.waits is not None or not self.config.record_path.exists():
            return None
        try:
            return read_record(self.config.record_path)
        except UserError:
            return None

    @property
    def is_complete(self) -> bool:
        """Whether a record of a successful run exists."""
        record = self.record()
        return record is not None and record["status"] == "complete"

    @property
    def is_again(self) -> bool:
        """Whether its complete record, if it has one, is to be replaced."""
        return self.config.force or self.uncounted is not None


def stamp(record: Path) -> Stamp | None:
    """The stamp of a record; None without one."""
    try:
        found = record.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def experiments_of(name: str, scale: str) -> tuple[str, ...]:
    """The experiment YAMLs of a table, a figure or `all`; empty for names that need no runs.

    Raises:
        UserError: for an unknown name or scale.
    """
    check_choice("SCALE", scale, SCALES)
    known = {*EXPERIMENTS["paper"], *EXPERIMENTS["mini"], *MEASURED, *ELSEWHERE}
    check_choice("table", name, sorted(known, key=_split_number))
    return tuple(one for one in EXPERIMENTS[scale].get(name, ()) if (CONF / "experiment" / f"{one}.yaml").is_file())


def _split_number(name: str) -> tuple[str, int]:
    """`table10` -> (`table`, 10), so that it comes after `table9`."""
    words = name.rstrip("0123456789")
    return words, int(name[len(words) :] or 0)


def reads_folder(task: str) -> bool:
    """Whether a task reads what `DATA` or `TREES` names; the snippets are an asset."""
    return not task.startswith("snippets")


def in_evidence(overrides: Sequence[str]) -> list[str]:
    """Overrides that write to the committed evidence, unless they name another results folder."""
    place = [] if any(one.startswith("results_dir=") for one in overrides) else ["results_dir=results"]
    return [*place, *overrides]


def list_cells(experiment: str, extra: Sequence[str] = (), data: str | None = None) -> list[Cell]:
    """The cells of one experiment, in the order of execution.

    Args:
        experiment: a YAML of conf/experiment with `hydra.sweeper.params`.
        extra: further overrides for every cell; one of a sweeper parameter replaces its values (`seed=42,3705`).
        data: folder with the data of the tasks that take one, such as GLUE.

    Raises:
        UserError: for a missing YAML or a value that is not allowed.
    """
    return _list(experiment, extra, data, _cell)


def list_with_waiting(experiment: str, extra: Sequence[str] = (), data: str | None = None) -> list[Cell]:
    """As `list_cells`, with the cells that wait for a search: these have the rate of their YAML meanwhile."""
    return _list(experiment, extra, data, functools.partial(_cell, may_wait=True))


def _list(experiment: str, extra: Sequence[str], data: str | None, make: Callable[..., Cell]) -> list[Cell]:
    try:
        given = expand_aliases(extra)
        return [make(experiment, point, given, data) for point in _points(experiment, given)]
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, [f"experiment={experiment}", *extra], CONF) from None


def _points(experiment: str, extra: Iterable[str]) -> list[dict[str, str]]:
    params = read_sweep(experiment, CONF) or dict(GRID)
    params |= {key: value for key, _, value in (one.partition("=") for one in extra) if key in params}
    # The first parameter varies slowest, as in a multirun of Hydra.
    axes = [[(key, value.strip()) for value in text.split(",")] for key, text in params.items()]
    return [dict(point) for point in itertools.product(*axes)]


def _cell(
    experiment: str,
    point: dict[str, str],
    extra: Sequence[str],
    data: str | None,
    *,
    may_wait: bool = False,
) -> Cell:
    rest = [one for one in extra if one.partition("=")[0] not in point]
    overrides = [*(f"{key}={value}" for key, value in point.items()), *rest]
    own = [one for one in overrides if not one.startswith("hydra.")]  # options of Hydra are for the launcher
    composed = compose_run([f"experiment={experiment}", *own], CONF)
    if data and reads_folder(composed.task.name):
        composed.data.dir = data
        overrides.append(f"data.dir={data}")
    source, waits = None, None
    try:
        source = _fill(composed, overrides)
    except SearchMissingError as error:
        if not may_wait:
            raise
        composed.hparams, waits = None, error
        if error.rate is not None and KEY not in map(key_of, overrides):
            composed.train.lr = error.rate
        OmegaConf.resolve(composed)
    config, given = build(composed), tuple(overrides)
    cell = Cell(experiment=experiment, point=point, overrides=given, config=config, hparams=source)
    if waits is None or (waits.rate is not None and not config.force and cell.is_complete):  # nothing will be trained
        return cell
    return replace(cell, waits=waits)


def _fill(composed: DictConfig, overrides: Iterable[str]) -> dict[str, Any] | None:
    """Insert the hyperparameters that `hparams` selects, as run.py does; their source, for the record."""
    selected = composed.get("hparams") is not None
    found = hparams.apply(composed, {key_of(one) for one in overrides}) if selected else None
    OmegaConf.resolve(composed)
    return found
