"""Plans of the evidence runs: what conf/experiment/NAME.yaml promises, and its hash.

A plan has a node `evidence` with the rules of its table; docs/evidence.md describes its fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.paths import CONF
from sparsegrad.errors import UserError, check_choice, check_integer, check_number, fail, first_line
from sparsegrad.runs.plan import plan_hash

REGIMES = {"paper": True, "mlp_only": False}  # -> train.train_rest
MIN_SEEDS = 3  # no interval from fewer
# Fields that runs and searches read, and tables do not.
OF_RUNS = (
    "rates_of", "carry", "epochs", "eval_steps", "patience_from", "max_train", "direction", "head_lr", "own_head_lr",
)  # fmt: skip
FIELDS = (
    "gates", "gate_method", "gate_experiment", "budget", "regime", "seeds", "min_seeds", "max_improving", "reference",
    "exploratory", "floors", "share", *OF_RUNS,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvidencePlan:
    """One experiment YAML with its rules.

    Attributes:
        experiment: name of the YAML.
        folder: folder of its records below results/runs.
        sha256: hash of its content.
        path: its file.
        gates: task -> points that tuned `gate_method` must reach.
        budget: trials of each search; None without searches.
        regime: what trains besides the MLP weights: everything (paper), or the head alone (mlp_only).
        seeds: seeds that every arm must have.
        min_seeds: fewest seeds of an interval; less than `MIN_SEEDS` counts as that.
        max_improving: largest share of runs that still improve at their last evaluation.
        gate_experiment: folder whose runs decide the gates, if this plan does not train `gate_method`.
        reference: arm that the others are compared with; None: the table's usual one.
        exploratory: whether its results are apart from the evidence.
        floors: methods that are shown to read the others by, and need not learn.
        share: share of each MLP weight that every method should train, besides the floors; None: no such rule.
        grid: sweeper parameter -> values.
        method: options that all its arms share.
        hparams: where learning rates come from.
    """

    experiment: str
    folder: str
    sha256: str
    path: Path
    gates: Mapping[str, float] = field(default_factory=dict)
    gate_method: str = "full"
    gate_experiment: str | None = None
    budget: int | None = None
    regime: str = "paper"
    seeds: tuple[int, ...] = ()
    min_seeds: int = MIN_SEEDS
    max_improving: float = 0.2
    reference: str | None = None
    exploratory: bool = False
    floors: tuple[str, ...] = ()
    share: float | None = None
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    hparams: str | None = None

    @property
    def planned(self) -> int:
        """Number of runs."""
        return math.prod(len(values) for values in self.grid.values()) if self.grid else 0

    @property
    def fewest_seeds(self) -> int:
        """Fewest common seeds from which a difference has an interval."""
        return max(MIN_SEEDS, self.min_seeds)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of the grid, or those with a gate."""
        return self.grid.get("task", tuple(self.gates))

    @property
    def takes_trees(self) -> bool:
        """Whether its task reads conversation trees instead of GLUE."""
        return "oasst1" in self.tasks


def read_plan(experiment: str, conf: Path = CONF) -> EvidencePlan | None:
    """The plan of an experiment; None if it has no YAML.

    Raises:
        UserError: for a field of `evidence` that is not allowed.
    """
    path = conf / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        return None
    try:
        node = load_node(path)
        content: dict[str, Any] = OmegaConf.to_container(node, resolve=False)  # type: ignore[assignment]
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): correct it") from None
    params = ((content.get("hydra") or {}).get("sweeper") or {}).get("params") or {}
    grid = {key: tuple(part.strip() for part in str(value).split(",")) for key, value in params.items()}
    rules = _check_rules(content.get("evidence") or {}, path)
    _check_floors(rules, grid, path)
    seeds = rules.pop("seeds", None) or tuple(int(seed) for seed in grid.get("seed", ()) if seed.isdigit())
    known: dict[str, Any] = {
        "folder": str(content.get("name", experiment)),
        "sha256": plan_hash(path),
        "path": path,
        "grid": grid,
        "seeds": seeds,
    }
    known |= {"method": content.get("method") or {}, "hparams": content.get("hparams")}
    return EvidencePlan(experiment=experiment, **known, **rules)


def load_node(path: Path) -> DictConfig:
    """A YAML over those beside it that its defaults name; choices of other groups stay in `defaults`, its own last."""
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    bases = [path.with_name(f"{one}.yaml") for one in node.get("defaults", []) if isinstance(one, str)]
    parents = [load_node(base) for base in bases if base.is_file() and base != path]
    merged = OmegaConf.merge(*parents, node)
    assert isinstance(merged, DictConfig)
    if parents:  # a merge replaces lists, which would lose the parents' choices
        merged.defaults = [one for each in (*parents, node) for one in each.get("defaults", [])]
    return merged


def _check_rules(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `evidence`, checked."""
    rules, where = dict(found), f"{path.name}: evidence"
    for name in rules:
        check_choice(f"{where} field", name, FIELDS)
    if (gates := rules.get("gates")) is not None:
        rules["gates"] = {str(task): check_number(f"{where}.gates.{task}", gate) for task, gate in gates.items()}
    if rules.get("budget") is not None:
        check_integer(f"{where}.budget", rules["budget"], at_least=1)
    if "min_seeds" in rules:
        check_integer(f"{where}.min_seeds", rules["min_seeds"], at_least=1)
    if "max_improving" in rules:
        check_number(f"{where}.max_improving", rules["max_improving"], at_least=0.0, at_most=1.0)
    check_choice(f"{where}.regime", rules.get("regime", "paper"), tuple(REGIMES))
    if rules.get("share") is not None:
        check_number(f"{where}.share", rules["share"], above=0.0, at_most=1.0)
    seeds = rules.get("seeds")
    if seeds is not None:
        if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
            raise fail(f"{where}.seeds", seeds, "give a list of integers, such as [42, 3705, 2023]")
        rules["seeds"] = tuple(dict.fromkeys(seeds))
    return {name: value for name, value in rules.items() if value is not None and name not in OF_RUNS}


def _check_floors(rules: dict[str, Any], grid: Mapping[str, tuple[str, ...]], path: Path) -> None:
    """Floors are methods of the plan, and not the one that the others are compared with."""
    where, floors = f"{path.name}: evidence.floors", rules.get("floors")
    if floors is None:
        return
    if not isinstance(floors, list):
        raise fail(where, floors, "give a list of methods, such as [frozen, bitfit]")
    for floor in floors:
        check_choice(where, floor, grid.get("method", ()))
        if floor == rules.get("reference"):
            raise fail(where, floor, "it is evidence.reference", "choose another reference")
    rules["floors"] = tuple(floors)
