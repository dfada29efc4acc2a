"""Earlier and alternative names in a composed configuration, turned into today's; and the name of a method."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsegrad.errors import check_choice, fail, warn_renamed

_ENGINES = ("exact", "layer", "fast")
# What engine `fast` does not have, with the value that leaves it out.
_NOT_FAST: dict[str, Any] = {
    "keep": None, "backward": "regular", "sides": "both", "moments": "dense", "release_gradients": False,
    "drop_padding": False, "save_dtype": None, "basis": None, "rotation_order": "auto", "rotation_dtype": None,
    "static": False,
}  # fmt: skip


def with_current_names(composed: DictConfig) -> DictConfig:
    """`composed` with today's names: engine `merged` is `exact`; engine `fast` is the method of that name.

    peft's types are in capitals, so that `shira` and `SHIRA` are one run.

    Raises:
        UserError: for an unknown engine of the method `sparsegrad`, or for settings beside `method.engine=fast` that
            this engine does not have.
    """
    engine, name = (OmegaConf.select(composed, f"method.{key}") for key in ("engine", "name"))
    if engine == "merged":
        warn_renamed("method.engine=merged", "method.engine=exact")
        composed = composed.copy()
        composed.method.engine = "exact"
    elif engine is not None and name == "sparsegrad":
        # Here, because the method's own check does not know `fast`, which is a method of its own.
        check_choice("method.engine", engine, _ENGINES)
    if engine == "fast" and name == "sparsegrad":
        composed = composed.copy()
        OmegaConf.update(composed, "method", _fast_method(composed), merge=False, force_add=True)
    kind = OmegaConf.select(composed, "method.config.peft_type")
    if isinstance(kind, str) and not kind.isupper():
        composed = composed.copy()
        composed.method.config.peft_type = kind.upper()
    return composed


def name_method(method: Mapping[str, Any]) -> str:
    """What lines and tables call the method of this node: its name; for `method=peft`, which is many, with the type."""
    config = method.get("config")
    kind = config.get("peft_type") if isinstance(config, Mapping) else None
    return f"peft {str(kind).upper()}" if method["name"] == "peft" and kind else str(method["name"])


def with_one_amount(composed: DictConfig, given: Collection[str]) -> DictConfig:
    """`composed` without the default of `method.keep` where the user gives `method.density`, and the reverse.

    A method takes one of both, and which of them a model has by default should not matter to the user.

    Args:
        composed: the configuration.
        given: the keys that the command line sets.
    """
    for wanted, other in (("density", "keep"), ("keep", "density")):
        is_given = f"method.{wanted}" in given and OmegaConf.select(composed, f"method.{wanted}") is not None
        if is_given and f"method.{other}" not in given and OmegaConf.select(composed, f"method.{other}") is not None:
            composed = composed.copy()
            composed.method[other] = None
    return composed


def _fast_method(composed: DictConfig) -> dict[str, Any]:
    """The node of `method=sparsegrad method.engine=fast`: what conf/method/sparsegrad_fast.yaml gives."""
    method: Any = OmegaConf.to_container(composed.method, resolve=True)
    usual = {name: OmegaConf.select(composed, f"model.usual.{name}") for name in ("density", "keep", "fast_density")}
    for name, value in _NOT_FAST.items():
        allowed = (value, usual["keep"]) if name == "keep" else (value,)
        if method.get(name, value) not in allowed:
            raise fail(f"method.{name}", method[name], "engine=fast has only density and steps", "leave it out")
    density = method["density"]
    if density is None or density == usual["density"]:
        density = usual["fast_density"] or density or 0.01
    target = "sparsegrad.methods.sparsegrad_fast.SparseGradFast"
    return {"_target_": target, "name": "sparsegrad_fast", "density": density, "steps": method["steps"]}
