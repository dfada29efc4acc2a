"""Which plans of a checkout have which searches (conf/experiment), and how a search that is lacking is made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sparsegrad.runs.overrides import key_of
from sparsegrad.sweeps.make_commands import search_command

CONF = Path(__file__).resolve().parents[2] / "conf"  # of the checkout: a wheel has neither plans nor their commands
SEARCHED = ("evidence_paper", "evidence_mlp_only", "evidence_smollm2")  # plans whose searches `make search` makes
COMPARED = ("compare", "compare_smollm2")  # those of which `make compare` does
LOSSES = frozenset({"nll", "perplexity"})  # main metrics that are better lower
DEFAULT, COMMITTED = "outputs", "results"  # results_dir of a user's runs, and the folder of the committed evidence


@dataclass(frozen=True)
class _Plan:
    """A plan with searches: `make search` makes those of its grid, `make compare` those of any method."""

    name: str
    model: str
    train_rest: bool
    methods: frozenset[str]
    tasks: frozenset[str]

    @property
    def target(self) -> str:
        """Of the Makefile."""
        return target_of(self.name)

    def has(self, model: str, train_rest: bool, method: str, task: str) -> bool:
        is_method = _find_option(method) is not None if self.name in COMPARED else method in self.methods
        return (self.model, self.train_rest) == (model, train_rest) and is_method and task in self.tasks


def explain_making(composed: DictConfig, model: str, method: str, what: str, *args: str) -> str:
    """`make search ...` or `make compare ...`, and `what` it does; for a run of no plan, how to do without the search.

    Args:
        composed: the configuration of the run, with its task, data and results folder.
        model: of the search.
        method: of the search.
        what: such as `fills what is missing`.
        args: further `ARGS` of the command; `results_dir=` takes the place of the run's.
    """
    task, train_rest = str(composed.task.name), bool(composed.train.train_rest)
    plans = {plan.target: plan for plan in _read_plans() if plan.has(model, train_rest, method, task)}
    if not plans:
        return f"no plan has this search: {_explain_own_search(composed)}"
    is_compared = "compare" in plans and (len(plans) == 1 or composed.name in COMPARED)
    plan = plans["compare" if is_compared else "search"]
    if composed.get("evidence") is None:  # such a run trains otherwise than the search
        return f"give experiment={plan.name}, to train as the search did; or {_explain_own_search(composed)}"
    where = [] if any(key_of(one) == "results_dir" for one in args) else where_of(composed.results_dir)
    return f"{search_command(plan.target, [method], [task], composed.data.dir, [*where, *args])} {what}"


def target_of(plan: str) -> str:
    """The target of the Makefile that makes the searches of a plan."""
    return "compare" if plan in COMPARED else "search"


def where_of(results_dir: str) -> list[str]:
    """The override by which `make search` fills the searches that runs of a results folder read."""
    return [] if results_dir in (DEFAULT, COMMITTED) else [f"results_dir={results_dir}"]


def find_exported(results_dir: str, file: str) -> Path:
    """The path of a search's export: in `results_dir`, or for the default folder in the committed evidence."""
    own = Path(results_dir) / file
    return Path(COMMITTED) / file if results_dir == DEFAULT and not own.exists() else own


def _explain_own_search(composed: DictConfig) -> str:
    """The command of a short search of a run's model, method and task, and how its result is used."""
    names = {group: str(composed[group].name) for group in ("model", "method", "task")}
    words = [f"model={names['model']}", f"method={_find_option(names['method']) or names['method']}"]
    words += [f"task={names['task']}", *_list_differences(composed)]
    study = "-".join(["quick", *names.values()])
    return (
        f"give train.lr=RATE and hparams=null, or run python run.py sweep=quick {shlex.join(words)}, and give "
        f"hparams=study:{study}"
    )


def _list_differences(composed: DictConfig) -> Iterator[str]:
    """The overrides that such a search needs besides model, method and task."""
    if composed.task.get("main_metric") in LOSSES:
        yield "sweep.direction=minimize"
    usual = OmegaConf.select(composed, "model.usual.train_rest", default=True)
    if (rest := composed.train.train_rest) != usual:
        yield f"train.train_rest={str(rest).lower()}"
    if composed.data.dir is not None:
        yield f"data.dir={composed.data.dir}"
    if composed.results_dir != DEFAULT:
        yield f"results_dir={composed.results_dir}"


@lru_cache
def _find_option(method: str) -> str | None:
    """The option of conf/method of a name, with its folder: `peft/dora`; None if there is none."""
    folder = CONF / "method"
    found = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"{method}.yaml"))
    return found[0] if found else None


@lru_cache
def _read_plans() -> tuple[_Plan, ...]:
    return tuple(filter(None, map(_read_plan, (*SEARCHED, *COMPARED))))


def _read_plan(name: str) -> _Plan | None:
    """One YAML; None without a checkout, or for one that its own command refuses."""
    try:
        path = CONF / "experiment" / f"{name}.yaml"
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        evidence, grid = node["evidence"], node["hydra"]["sweeper"]["params"]
        (model,) = (one["override /model"] for one in node["defaults"] if "override /model" in one)
        methods = frozenset(one.rpartition("/")[2] for one in grid["method"].split(","))
        return _Plan(name, model, evidence["regime"] == "paper", methods, frozenset(grid["task"].split(",")))
    except (OSError, YAMLError, OmegaConfBaseException, LookupError, TypeError, ValueError, AttributeError):
        return None
