"""How peft stores each changed module, as LoRA matrices or whole in `modules_to_save`; and its rules for names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparsegrad.errors import UserError

REMEDY = (
    "freeze it before training (train_rest=False of prepare, train.train_rest=false of run.py, freezes all parameters "
    "outside the targets), or use sparsegrad.save_adapter, which stores any change"
)
# End of a class name -> peft's task type, and the heads that peft stores whole for it, whether they changed or not.
_HEADS = ("classifier", "score")
_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForSequenceClassification": ("SEQ_CLS", _HEADS),
    "ForTokenClassification": ("TOKEN_CLS", _HEADS),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
}
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # peft cannot wrap them


@dataclass(frozen=True)
class Layout:
    """Where each change is stored.

    Attributes:
        targets: names of linears with LoRA matrices, in the model's order.
        whole: names of the modules that are stored whole, in the model's order.
        modules_to_save: the names that make peft select `whole`.
        bias: whether LoRA matrices have a bias, the change of the linear's own.
    """

    targets: list[str]
    whole: list[str]
    modules_to_save: list[str]
    bias: bool


def takes_lora(module: nn.Module) -> bool:
    """Whether peft puts LoRA on `module`: `nn.Linear`, or GPT-2's `Conv1D`, recognized by its name."""
    # `nn.MultiheadAttention` reads the weight of its output linear and never calls it, so LoRA would have no effect.
    plain = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return plain or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_task(model: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """peft's task type, None if unknown; and the ends of names of the heads that peft then stores whole."""
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    ):
        return "SEQ_2_SEQ_LM", ()
    return next((task for end, task in _TASKS.items() if name.endswith(end)), (None, ()))


def plan_layout(model: nn.Module, changed: Collection[str], targets: Iterable[str], fixed: Collection[str]) -> Layout:
    """Decide how each changed tensor is stored.

    Args:
        model: with plain linears.
        changed: names of the changed tensors.
        targets: names of linears with a changed weight that can have LoRA matrices.
        fixed: those of them that must have them, because the caller named them or they are of engine `fast`. All others
            are stored whole where peft requires it.

    Raises:
        UserError: for a tensor that peft can store neither way.
    """
    # Linears that are stored whole for another reason must not count when targets with and without bias are mixed.
    _, _, found = _store_whole(model, changed, list(targets), fixed)
    asked, whole, found = _store_whole(model, changed, _drop_mixed(model, changed, found, fixed), fixed)
    return Layout(found, whole, asked, any(f"{name}.bias" in changed for name in found))


def _store_whole(
    model: nn.Module, changed: Collection[str], targets: list[str], fixed: Collection[str]
) -> tuple[list[str], list[str], list[str]]:
    """Entries of `modules_to_save`, the modules that they select, and the targets that are not inside them."""
    stored = {f"{name}.{part}" for name in targets for part in ("weight", "bias")}
    owners = {name: name.rpartition(".")[0] for name in changed if name not in stored}
    for tensor, owner in owners.items():
        if not owner or isinstance(model.get_submodule(owner), CONTAINERS):
            kind = type(model.get_submodule(owner)).__name__
            raise UserError(f"{tensor} is a tensor of a {kind}, which peft cannot store in modules_to_save: {REMEDY}")
    # The heads of the task are stored whether they changed or not.
    asked, whole = _select_whole(model, {*owners.values(), *_find_heads(model)})
    covered = [name for name in targets if any(_contains(one, name) for one in whole)]
    if lost := [name for name in covered if name in fixed]:
        inside = next(one for one in whole if _contains(one, lost[0]))
        raise UserError(
            f"{inside} is stored whole in peft, by its task type or because it changed outside the LoRA targets, and "
            f"contains the target {lost[0]}: leave {lost[0]} out of target_modules=, or {REMEDY}"
        )
    return asked, whole, [name for name in targets if name not in covered]


def _find_heads(model: nn.Module) -> list[str]:
    ends = find_task(model)[1]
    return [name for name, _ in model.named_modules() if ends and name.endswith(ends)]


def _select_whole(model: nn.Module, wanted: Collection[str]) -> tuple[list[str], list[str]]:
    """Entries of `modules_to_save` for the modules `wanted`, and all modules that peft selects by them."""
    names = [name for name, _ in model.named_modules() if name]
    entries = [name for name in names if name in _outermost(wanted)]
    # peft compares ends of names without regard to dots: `classifier` also selects `pre_classifier`.
    selected = [name for name in names if entries and name.endswith(tuple(entries))]
    if nested := set(selected) - _outermost(selected):
        inner = sorted(nested)[0]
        outer = next(name for name in selected if name != inner and _contains(name, inner))
        raise UserError(f"peft would store {inner} both alone and inside {outer}: {REMEDY}")
    return entries, selected


def _drop_mixed(model: nn.Module, changed: Collection[str], targets: list[str], fixed: Collection[str]) -> list[str]:
    """Leave out linears with a changed bias or those without bias: peft's `lora_bias` is for all targets or none."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
    biased = [name for name in targets if f"{name}.bias" in changed]
    without = [name for name, module in modules.items() if module.bias is None]
    if not biased or not without:
        return targets
    droppable = [names for names in (biased, without) if not any(name in fixed for name in names)]
    if not droppable:
        raise UserError(
            f"{biased[0]}.bias changed, and {without[0]} has no bias: peft has LoRA biases for all targets or none; "
            f"leave one of the two out of target_modules=, or {REMEDY}"
        )
    # Stored whole, the group with fewer entries costs less.
    dropped = min(droppable, key=lambda names: sum(modules[name].weight.numel() for name in names))
    return [name for name in targets if name not in dropped]


def _contains(outer: str, name: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _outermost(names: Iterable[str]) -> set[str]:
    """The names that are not inside another of `names`."""
    found = set(names)
    return {name for name in found if not any(other != name and _contains(other, name) for other in found)}


def shorten_names(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """The shortest ends of names that match the modules `targets` among `names` and no other, by peft's rule.

    peft matches an entry with the module of that name, and with every module whose name ends in a dot and the entry.
    """
    targets, others = set(targets), set(names)
    others -= targets
    return sorted({_shorten(name, others) for name in targets})


def _shorten(name: str, others: set[str]) -> str:
    parts = name.split(".")
    for start in reversed(range(len(parts))):
        end = ".".join(parts[start:])
        # `layer.0.output` reads better than `0.output`, which would do as well.
        if not (start and parts[start].isdigit()) and not any(_matches(end, other) for other in others):
            return end
    clash = next(other for other in others if _matches(name, other))
    raise UserError(
        f"peft cannot select {name} without {clash}, whose name ends in it: name both in target_modules=, or use "
        "sparsegrad.save_adapter"
    )


def _matches(end: str, name: str) -> bool:
    return name == end or name.endswith(f".{end}")


def make_config(model: nn.Module, layout: Layout, ranks: Mapping[str, int], base: str | None) -> dict[str, Any]:
    """The content of peft's adapter_config.json. alpha equals the rank everywhere, so that B A is the change itself."""
    largest = max(ranks.values())
    # peft reads the keys as regular expressions for the end of a name; ^ makes them match one module.
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != largest}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": find_task(model)[0],
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": shorten_names(layout.targets, (name for name, _ in model.named_modules())),
        "modules_to_save": layout.modules_to_save or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(is_transposed(model.get_submodule(name)) for name in layout.targets),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    # Only where needed: versions of peft before 0.14 refuse names that they do not know.
    return {**config, "lora_bias": True} if layout.bias else config
