"""The plan that a run belongs to: its YAML of conf/experiment, known by the hash of its content.

A table rests on runs of its plan as it is now. The record of a plan that was edited afterwards has another hash, and
counts as exploratory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sparsegrad.hashing import SHORT, json_sha256


def plan_hash(path: Path) -> str:
    """16 hex digits of what a plan says; comments and order of keys have no part in it."""
    return json_sha256(OmegaConf.to_container(OmegaConf.load(path), resolve=False))[:SHORT]


def current_plan() -> dict[str, Any] | None:
    """The plan of this process's command line, for the record; None without `experiment=`."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    name = hydra.runtime.choices.get("experiment")
    if not name or name == "null":
        return None
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    files = [folder / "experiment" / f"{name}.yaml" for folder in folders]
    path = next((file for file in files if file.is_file()), None)
    return {"experiment": name, **({} if path is None else {"sha256": plan_hash(path)})}
