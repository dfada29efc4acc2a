"""`hparams=search`: the learning rate that a method's search of an evidence plan found (conf/sweep/evidence.yaml).

The exported summaries in results/studies are enough: neither Optuna nor the storage is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsegrad.distributed import world_size
from sparsegrad.errors import UserError, check_integer, first_line
from sparsegrad.files import load_json, unreadable
from sparsegrad.runs.keys import LATER, determining, flatten
from sparsegrad.sweeps.search_plans import LOSSES, explain_making, find_exported
from sparsegrad.sweeps.search_way import find_other_data, find_other_way, read_way, study_name

KEY = "train.lr"
OVERWRITE = "sweep.overwrite=true"  # makes a search anew
OTHER_FOLDER = "results_dir=FOLDER"  # makes it beside the existing one
OWN_NAME = "store these settings as conf/method/NAME.yaml with name: NAME, and give METHODS=NAME to make compare"
# A plan may train other numbers of entries at one searched rate, as evidence_density does; `make search` and
# `make compare` refuse these, too.
_AMOUNT = ("density", "keep")
# Groups whose settings a search and its runs have in common, apart from the method.
CONDITIONS = ("train", "data", "protocol", "model")
_SIZES = ("batch_size", "grad_accumulation")  # rows of a step, for each process
_APART = {  # settings that change no result, or are compared otherwise
    "train": ("parallel", "gradient_checkpointing", *_SIZES),
    "protocol": ("watch_validation",),
}
_OF_MODEL = ("pooling", "keep_head")  # the rest of it is its name, or the size of a method


class SearchMissingError(UserError):
    """A run needs the result of a search that has not been made, is not finished or is of other settings.

    Attributes:
        study: name of the search.
        method: that it is of.
        task: that it is of.
        reason: what is wrong with it, without the remedy.
        is_other: whether it is there and does not fit, so that to continue it is no remedy.
        rate: the rate of a search that only was on other data: complete runs may have it.
    """

    is_other: bool = False
    rate: float | None = None

    def __init__(self, study: str, method: str, task: str, reason: str, remedy: str) -> None:
        super().__init__(f"hparams=search: {reason}: {remedy}")
        self.study, self.method, self.task, self.reason = study, method, task, reason


def read_settings(composed: DictConfig, seed: int, group: str = "method") -> dict[str, Any]:
    """The settings of one group of a composed configuration that determine the result, by dotted key, without a name.

    Args:
        composed: the whole configuration, to which the settings refer.
        group: `method`, or one of `CONDITIONS`.
        seed: stands for the seed, on which settings such as `random_seed: ${seed}` depend: a search has one of its own.

    Raises:
        UserError: if a setting cannot be resolved.
    """
    config = composed
    if config.seed != seed:
        config = composed.copy()
        config.seed = seed
    try:
        node: Any = OmegaConf.to_container(config[group], resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {first_line(error)}") from None
    return select_settings(flatten(determining({group: node})), group)


def select_settings(fixed: Mapping[str, Any], group: str = "method") -> dict[str, Any]:
    """The settings of one group among the values that all trials of a study share, as JSON stores them."""
    found = {key.removeprefix(f"{group}."): value for key, value in fixed.items() if key.startswith(f"{group}.")}
    return {key: value for key, value in json.loads(json.dumps(found)).items() if key != "name"}


def find_difference(there: Mapping[str, Any], here: Mapping[str, Any], group: str = "method") -> str:
    """The first setting in which a search and a run differ, in words; empty if all are the same."""
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if not keys:
        return ""
    # Settings that came later are left out where they mean "as before".
    values = [settings.get(keys[0], LATER.get((group, keys[0]))) for settings in (there, here)]
    return f"{group}.{keys[0]}={values[0]}, not {values[1]}"


def select_conditions(fixed: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """`select_settings` of each of `CONDITIONS`; None for a group without any."""
    return {group: select_settings(fixed, group) or None for group in CONDITIONS}


def find_other_condition(
    there: Mapping[str, Mapping[str, Any] | None], composed: DictConfig, searched: Collection[str]
) -> str:
    """`find_difference` for the conditions under which a search and a run train.

    Args:
        there: group -> the settings that all trials of the search share. A group that is None or missing is not
            compared: a summary of an earlier version does not list it.
        composed: the configuration of the run.
        searched: the keys that the search tries, such as `train.lr`.
    """
    for group in CONDITIONS:
        stored, here = there.get(group), read_settings(composed, composed.seed, group)
        if not stored:
            continue
        left_out = {*_APART.get(group, ()), *(key.removeprefix(f"{group}.") for key in searched)}
        compared = set(_OF_MODEL) if group == "model" else (stored.keys() | here.keys()) - left_out
        before, now = ({key: one[key] for key in one if key in compared} for one in (stored, here))
        if found := find_difference(before, now, group):
            return found
    return _find_other_rows(there.get("train") or {}, read_settings(composed, composed.seed, "train"))


def _find_other_rows(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Whether a search and a run have other numbers of rows per step, in words."""
    if not all(key in there for key in _SIZES):  # an earlier summary, or the batch size is searched
        return ""
    rows = [math.prod(int(one[key]) for key in _SIZES) for one in (there, here)]
    rows[1] *= world_size()
    return "" if rows[0] == rows[1] else f"{rows[0]} rows per step, not {rows[1]}"


def read_search(composed: DictConfig, by_hand: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the rate for a composed configuration.

    A plan may say `evidence.budget`, the number of trials that the search must have; `evidence.rates_of`, which names
    for a method the method whose search it uses, whatever its own settings; and `evidence.carry`, for a model without
    searches: its `full_lr` times the ratio of the method's rate to full fine-tuning's on `model`. Otherwise the search
    must be of this run's settings of the method, except for the number of kept entries.

    Args:
        composed: the configuration.
        by_hand: keys that the command line sets; a summary that does not list settings is of the defaults.

    Returns:
        The values to set, and facts on the search for the record.

    Raises:
        UserError: if the search is missing, damaged, unfinished, of another regime, of other settings of the method, or
            of training, or has another budget.
        ResourceError: when the disk does not let its summary be read.
    """
    plan: Mapping[str, Any] = composed.get("evidence") or {}
    if "budget" in plan:
        check_integer("evidence.budget", plan["budget"], at_least=1)
    method = str((plan.get("rates_of") or {}).get(composed.method.name, composed.method.name))
    carry = plan.get("carry")
    if carry is None:
        found = _read_summary(composed, composed.model.name, method, plan.get("budget"))
        if composed.method.name not in (plan.get("rates_of") or {}):
            _check_settings(composed, found, by_hand)
        return {KEY: float(found["best"]["values"][KEY])}, _make_facts(found)
    found, full = (_read_summary(composed, str(carry["model"]), one, plan.get("budget")) for one in (method, "full"))
    ratio = float(found["best"]["values"][KEY]) / float(full["best"]["values"][KEY])
    facts = {**_make_facts(found), "ratio_to_full": round(ratio, 4)}
    return {KEY: float(f"{float(carry['full_lr']) * ratio:.3g}")}, facts


def _make_facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {"study": summary["study"], "budget": summary["budget"], "at_edge": summary["at_edge"]}


def _read_summary(composed: DictConfig, model: str, method: str, budget: int | None) -> dict[str, Any]:
    """Read the summary of one search and check that it is the one that this run needs."""
    task, train_rest = composed.task.name, bool(composed.train.train_rest)
    name = study_name(model, method, task, train_rest)
    path = find_exported(composed.results_dir, f"studies/{name}/summary.json")
    remedy = explain_making(composed, model, method, "fills what is missing")
    try:
        found = _parse_summary(path)
    except FileNotFoundError:
        raise SearchMissingError(name, method, task, f"the search {name} is missing ({path})", remedy) from None
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"hparams=search: {path} is not a summary of a search ({error!r}): restore it; else {remedy}"
        ) from None
    labels = tuple(found["labels"][key] for key in ("model", "method", "task"))
    if labels != (model, method, task):
        raise UserError(f"hparams=search: {path} is of {' / '.join(map(str, labels))}, not {name}: {remedy}")
    _check_rows(found, name, train_rest, remedy)
    anew = explain_making(composed, model, method, "makes it anew", OVERWRITE)
    _check_budget(found, name, budget, remedy, anew)
    _check_conditions(composed, found, name, method)
    _check_way(composed, found, name, anew)
    _check_data(composed, found, name)
    return found


def _check_rows(found: dict[str, Any], name: str, train_rest: bool, remedy: str) -> None:
    """Check the regime of a search, and the rows that chose its best trial."""
    if found["train_rest"] is not train_rest:
        raise UserError(
            f"hparams=search: {name} searched another regime (train.train_rest={found['train_rest']}, this run has "
            f"{train_rest}): {remedy}"
        )
    if found["objective"] != "heldout":
        rows = found["objective"]
        raise UserError(f"hparams=search: {name} was chosen on {rows} rows, a table needs heldout: {remedy}")


def _check_budget(found: dict[str, Any], name: str, budget: int | None, remedy: str, anew: str) -> None:
    """Check that a search has the budget of the plan, and has spent it."""
    spent, finished = found["budget"], count_finished(found)
    method, task = found["labels"]["method"], found["labels"]["task"]
    if budget is not None and spent != budget:
        reason = f"{name} has a budget of {spent} trials, this plan one of {budget}"
        raise _make_refusal(found, name, reason, f"all methods need the same; {anew}")
    if not isinstance(spent, int) or finished < spent:
        raise SearchMissingError(name, method, task, f"{name} has {finished} of {spent} trials", remedy)


def _make_refusal(summary: Mapping[str, Any], name: str, reason: str, remedy: str) -> SearchMissingError:
    """The error for a search that is another one than a run needs."""
    error = SearchMissingError(name, summary["labels"]["method"], summary["labels"]["task"], reason, remedy)
    error.is_other = True
    return error


def _parse_summary(path: Path) -> dict[str, Any]:
    """Read a summary and look up every entry that the checks use: a damaged file raises KeyError or the like here."""
    found: dict[str, Any] = load_json(path)
    for key in ("model", "method", "task"):
        found["labels"][key]
    for key in ("budget", "train_rest", "objective"):
        found[key]
    float(found["best"]["values"][KEY])
    count_finished(found)
    found["method"] = dict(found["method"]) if found.get("method") else None
    return found


def count_finished(summary: Mapping[str, Any]) -> int:
    """Finished trials of a summary; a built-in error if it is damaged."""
    return int(summary["trials"]["complete"]) + int(summary["trials"]["pruned"])


def _check_conditions(composed: DictConfig, summary: Mapping[str, Any], name: str, method: str) -> None:
    """Refuse a search that trained otherwise than this run does."""
    # A search on another model has its own protocol; the rate is carried over.
    groups = CONDITIONS if summary["labels"]["model"] == composed.model.name else ("train",)
    conditions = {group: summary.get(group) for group in groups}
    if other := find_other_condition(conditions, composed, summary["best"]["values"]):
        what = "makes it anew, where KEY=VALUE is that setting of this run; or leave it as it was"
        anew = explain_making(composed, str(summary["labels"]["model"]), method, what, "KEY=VALUE", OVERWRITE)
        raise _make_refusal(summary, name, f"{name} was searched with {other}", anew)


def _check_way(composed: DictConfig, summary: Mapping[str, Any], name: str, anew: str) -> None:
    """Refuse a search that was not made as the others are."""
    metric = str(composed.task.main_metric)
    way = {
        **read_way(summary["train_rest"]),
        "metric": metric,
        "direction": "minimize" if metric in LOSSES else "maximize",
    }
    if other := find_other_way(summary, way):
        raise _make_refusal(summary, name, f"{name} was made with {other}", f"all methods need the same; {anew}")


def _check_data(composed: DictConfig, summary: Mapping[str, Any], name: str) -> None:
    """Refuse a search that was made on other data than this run reads."""
    model, method = (str(summary["labels"][key]) for key in ("model", "method"))
    # The data of another model's search may have other rows; only its rate is carried over.
    if model == composed.model.name and (other := find_other_data(summary, composed)):
        # Not anew: other runs have taken their rates from it.
        apart = explain_making(composed, model, method, "searches this data, for runs in FOLDER", OTHER_FOLDER)
        error = _make_refusal(
            summary, name, f"{name}: {other}", f"give the data of the search as data.dir=; or {apart}"
        )
        error.rate = float(summary["best"]["values"][KEY])
        raise error


def _check_settings(composed: DictConfig, summary: Mapping[str, Any], by_hand: Collection[str]) -> None:
    """Refuse a rate that was searched for other settings of the method."""
    if summary["method"] is None:
        given = sorted(key for key in by_hand if key.startswith("method.") and key[len("method.") :] not in _AMOUNT)
        found = f"the defaults, not {given[0]}={OmegaConf.select(composed, given[0])}" if given else ""
    else:
        here = read_settings(composed, composed.seed if summary.get("seed") is None else summary["seed"])
        there, here = ({key: one[key] for key in one if key not in _AMOUNT} for one in (summary["method"], here))
        found = find_difference(there, here)
    if found:
        own = "" if summary["train_rest"] else f"{OWN_NAME}; or "  # `make compare` has searches of the other regime
        raise UserError(
            f"hparams=search: {summary['study']} was searched with {found}: {own}set train.lr by hand and hparams=null"
        )
