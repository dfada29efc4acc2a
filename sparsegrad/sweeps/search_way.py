"""How the searches of the plans are to be made (conf/sweep/evidence*.yaml), and on which data: all are alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsegrad.errors import UserError
from sparsegrad.runs.config import build
from sparsegrad.sweeps.search_plans import CONF

# Name of the sweep by whether the parameters outside the MLP weights train: each regime has searches of its own.
SWEEPS = {True: "evidence", False: "evidence_mlp_only"}
_PRUNERS = {  # pruner -> those of its settings that it reads
    "median": ("pruner_startup_trials", "pruner_warmup"),
    "hyperband": ("pruner_warmup",),
    "patience": ("pruner_patience",),
}
_fingerprints: dict[str, str] = {}  # of the data that this process has read, by task and data as JSON


def study_name(model: str, method: str, task: str, train_rest: bool) -> str:
    """Return the name of a search, as conf/sweep/evidence*.yaml compose it."""
    return f"{SWEEPS[train_rest]}-{model}-{method}-{task}"


@lru_cache
def read_way(train_rest: bool) -> Mapping[str, Any]:
    """The `sampler`, `pruner`, `space` and `seed` of the searches of a regime; empty without a checkout."""
    names = ["custom", SWEEPS[True], *([] if train_rest else [SWEEPS[False]])]
    paths = [CONF / "sweep" / f"{name}.yaml" for name in names]
    if not all(path.is_file() for path in paths):
        return {}
    merged: Any = OmegaConf.merge(*map(OmegaConf.load, paths))
    space: Any = OmegaConf.to_container(merged.sweep.space)
    way = {"sampler": merged.sweep.sampler, "pruner": describe_pruner(merged.sweep), "space": space}
    return {**way, "seed": merged.seed}


def describe_pruner(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """The pruner of a `sweep` node, with its settings."""
    name = str(sweep["pruner"])
    return {"name": name, **{key.removeprefix("pruner_"): sweep[key] for key in _PRUNERS.get(name, ())}}


def find_other_way(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What a search was made with otherwise, in words; what one of the two does not say counts as the same.

    Args:
        there: a summary; one of an earlier version does not name all of these.
        here: `read_way`, or the same of a plan.
    """
    for part, wanted in here.items():
        if (found := there.get(part)) is not None and found != wanted:
            return f"{part}={describe_setting(found)}, not {describe_setting(wanted)}"
    return ""


def find_other_data(there: Mapping[str, Any], composed: DictConfig, *, of_hub: bool = False) -> str:
    """Whether a summary is of data with another content than that of a run, in words; empty if it cannot be read.

    Args:
        there: a summary, or an empty mapping.
        composed: the configuration of a run.
        of_hub: whether data of the hub is compared, too, although it would be fetched only for this.
    """
    stored = (there.get("content") or {}).get("data")
    if stored is None or (composed.data.dir is None and not of_hub):
        return ""
    try:
        found = _read_fingerprint(composed)
    except UserError:
        return ""  # the run itself says what is wrong
    return "" if found == stored else f"its data has the fingerprint {stored}, not {found}"


def _read_fingerprint(composed: DictConfig) -> str:
    """The fingerprint of a task's data, read once: each of hundreds of cells asks for it."""
    nodes = [OmegaConf.to_container(composed[name], resolve=True) for name in ("task", "data")]
    key = json.dumps(nodes, sort_keys=True)
    if key not in _fingerprints:
        run = build(composed)
        _fingerprints[key] = run.task.load(run.data).fingerprint
    return _fingerprints[key]


def describe_setting(value: Any) -> str:
    """A part of a summary in words: a pruner as `median (startup_trials=2, warmup=5)`, a space as its keys."""
    if not isinstance(value, Mapping):
        return str(value)
    settings = ", ".join(f"{key}={one}" for key, one in value.items() if key != "name")
    if "name" not in value:  # a space
        return settings
    return f"{value['name']} ({settings})" if settings else str(value["name"])
