"""An option of conf/method as an arm: composed as for a run, then set to the density of the setting."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from experiments.bench.arms import lora_rank
from experiments.bench.settings import Setting
from experiments.paths import CONF
from sparsegrad.methods.base import Method
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.config import build


def make_method(option: str, setting: Setting) -> Method:
    """The method of `conf/method/<option>.yaml`, with about the density of `setting` where its size can be set."""
    method: Any = build(compose_run([f"method={option}"], CONF)).method
    resized: Method = replace(method, **_choose_size(method, setting))
    return resized


def _choose_size(method: Any, setting: Setting) -> dict[str, Any]:
    known = {field.name for field in fields(method)}
    if getattr(method, "budget", None) is not None:
        return {"budget": f"density:{setting.density}"}
    if "density" in known:
        return {"density": setting.density, **dict.fromkeys(known & {"keep", "rank"})}  # the other ways are null
    return {"rank": lora_rank(setting)} if "rank" in known else {}
