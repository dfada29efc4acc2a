"""Find the MLP linears of a model by layer kind, through the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsegrad.distributed import refuse_shards
from sparsegrad.errors import UserError, check_choice, renamed_arguments

# Layer kind -> pattern that must match the whole module name. Many families share names: ViT of transformers 5.3 has
# BERT's, that of 5.23 `mlp.fc1`; Gemma, Phi-1 and others are found by the names they share with a family listed here.
_BERT = {
    "intermediate": r"(.*\.)?encoder\.layer\.\d+\.intermediate\.dense",
    "output": r"(.*\.)?encoder\.layer\.\d+\.output\.dense",
}
_DISTILBERT = {kind: rf"(.*\.)?layer\.\d+\.ffn\.{kind}" for kind in ("lin1", "lin2")}
_VIT = {kind: rf"(.*\.)?\d+\.mlp\.{kind}" for kind in ("fc1", "fc2")}
_GPT2 = {kind: rf"(.*\.)?h\.\d+\.mlp\.{kind}" for kind in ("c_fc", "c_proj")}
_LLAMA = {kind: rf"(.*\.)?layers\.\d+\.mlp\.{kind}_proj" for kind in ("gate", "up", "down")}
_T5 = {kind: rf"(.*\.)?block\.\d+\.layer\.\d+\.DenseReluDense\.{kind}" for kind in ("wi", "wo")}
_T5_GATED = {kind: rf"(.*\.)?block\.\d+\.layer\.\d+\.DenseReluDense\.{kind}" for kind in ("wi_0", "wi_1", "wo")}
LAYOUTS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "electra", "deberta", "deberta-v2", "mpnet"), _BERT),
    "distilbert": _DISTILBERT,
    "vit": _VIT,
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "t5": _T5,
    "t5-gated": _T5_GATED,
}

Linears = dict[str, dict[str, nn.Linear]]
"""Layer kind -> module name -> linear, in the model's order.

GPT-2's `Conv1D` stands here too. Its weight is (in, out), so its basis is the linear's with the two matrices
exchanged; the method treats rows and columns alike, and keeps the same entries.
"""
Names = Mapping[str, str] | Sequence[str] | str


@renamed_arguments(quiet=True, mlp="target_modules")
def find_mlp(model: nn.Module, target_modules: Names | None = None) -> Linears:
    """Find the MLP linears of `model` by kind.

    Args:
        model: any module; nothing is asked of its class.
        target_modules: None takes the one layout of `LAYOUTS` whose names the model has. Else the name of a layout; or
            layer kind -> regular expression for the whole module name; or a list of module names or their ends, as
            in `peft`: names that differ in numbers alone are one kind (`layers.*.mlp.up_proj`). `mlp=` is an alias.

    Raises:
        UserError: for an unknown or ambiguous layout, a bad expression, a kind without linears or with mixed shapes,
            a module of two kinds, a quantized or sharded weight, or one that other modules share.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}, not a torch.nn.Module: give the model itself")
    refuse_shards(model)
    named = _named(model, target_modules)
    _refuse_overlap(named)
    linears = {kind: _linears(model, kind, names) for kind, names in named.items()}
    _refuse_shared(model, linears)
    return linears


def check_trainable(linears: Linears) -> None:
    """Raise `UserError` for a weight that would stay as it is in silence: frozen, or in float16."""
    for found in linears.values():
        for name, linear in found.items():
            if not linear.weight.requires_grad:
                raise UserError(
                    f"{name}.weight is frozen (requires_grad=False): call requires_grad_(True) on it, or name the "
                    "other linears alone with target_modules={kind: pattern}"
                )
            check_updated(linear.weight, f"{name}.weight")


def _named(model: nn.Module, names: Names | None) -> dict[str, list[str]]:
    """Layer kind -> names of modules, not yet known to be linears."""
    if names is None:
        return _matching(model, _detect(model))
    if isinstance(names, str):
        return _matching(
            model, LAYOUTS[check_choice("target_modules", names, LAYOUTS, "or give {kind: pattern} or a list")]
        )
    if isinstance(names, Mapping) and names and all(isinstance(pattern, str) for pattern in names.values()):
        return _matching(model, names)
    if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
        return _listed(model, names)
    raise UserError(
        f"target_modules={names} names no layer kind: give {{kind: pattern}}, a list of module names, or one of "
        f"{', '.join(LAYOUTS)}"
    )


def _detect(model: nn.Module) -> dict[str, str]:
    """The one layout of which the model has every kind."""
    distinct = {tuple(layout.values()): (name, layout) for name, layout in reversed(LAYOUTS.items())}
    fitting = dict(pair for pair in distinct.values() if all(_matching(model, pair[1]).values()))
    if not fitting:
        raise UserError(
            f"{type(model).__name__} has the MLP names of no known layout ({', '.join(LAYOUTS)}): give "
            "target_modules={kind: pattern of module names}, or a list of names"
        )
    if len(fitting) > 1:
        raise UserError(
            f"{type(model).__name__} fits the layouts {', '.join(fitting)}: choose one of them as target_modules="
        )
    return next(iter(fitting.values()))


def _matching(model: nn.Module, patterns: Mapping[str, str]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for kind, pattern in patterns.items():
        try:
            matches = re.compile(pattern).fullmatch
        except re.error as error:
            raise UserError(f"target_modules.{kind}={pattern} is not a regular expression: {error}") from None
        named[kind] = [name for name, _ in model.named_modules() if matches(name)]
    return named


def _listed(model: nn.Module, wanted: Sequence[str]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for end in wanted:
        found = [name for name, _ in model.named_modules() if name == end or name.endswith(f".{end}")]
        if not found:
            named[end] = []
        for name in found:
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            named.setdefault(kind, [])
            if name not in named[kind]:
                named[kind].append(name)
    return named


def _refuse_overlap(named: Mapping[str, list[str]]) -> None:
    """A linear of two kinds would be rotated by both bases."""
    taken: dict[str, str] = {}
    for kind, names in named.items():
        for name in names:
            if name in taken:
                raise UserError(
                    f"{name} is of two kinds, {taken[name]} and {kind}: write patterns of which one matches it"
                )
            taken[name] = kind


def _linears(model: nn.Module, kind: str, names: list[str]) -> dict[str, nn.Linear]:
    """The modules of `names`, each checked to be a linear that can train."""
    if not names:
        raise UserError(
            f"{type(model).__name__} has no MLP linear of kind {kind}: name the model's own modules in "
            "target_modules={kind: pattern}"
        )
    found = {name: _linear(name, model.get_submodule(name)) for name in names}
    shapes = {tuple(linear.weight.shape) for linear in found.values()}
    if len(shapes) > 1:
        raise UserError(f"kind {kind} matches weights of shapes {sorted(shapes)}: name one kind per shape")
    return found


def _linear(name: str, module: nn.Module) -> nn.Linear:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and _is_quantized(weight):
        raise UserError(
            f"{name}.weight is quantized ({type(weight).__name__}, {weight.dtype}): SparseGrad changes the weight "
            "itself; load the model in float32 or bfloat16, or take LoRA for a quantized one"
        )
    # By name, not by class: transformers is not imported for it.
    if isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return module  # type: ignore[return-value]
    if hasattr(module, "base_layer"):  # peft's name for what it wraps
        raise UserError(
            f"{name} is wrapped by peft: call merge_and_unload() on the peft model first, and give its result"
        )
    if hasattr(module, "to_linear"):
        raise UserError(f"{name} is a {type(module).__name__} already: call sparsegrad.to_linears(model) first")
    raise UserError(f"{name} is a {type(module).__name__}, not a linear with a weight of its own: name only linears")


def _is_quantized(weight: Tensor) -> bool:
    """bitsandbytes marks its 4-bit weights, torchao has tensor classes of its own, others store integers or float8."""
    own_class = type(weight.data).__module__.startswith("torchao")
    narrow = not weight.dtype.is_floating_point or torch.finfo(weight.dtype).bits < 16
    return own_class or narrow or hasattr(weight, "quant_state")


def _refuse_shared(model: nn.Module, linears: Linears) -> None:
    """A weight under several names would be stepped for one of them and change all."""
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)
    for found in linears.values():
        for linear in found.values():
            names = named.get(id(linear.weight), [])
            if len(names) > 1:
                raise UserError(f"one weight is tied under the names {', '.join(names)}: untie it, or leave it out")


def all_linears(linears: Linears) -> Iterator[nn.Linear]:
    """Every MLP linear of every kind."""
    for found in linears.values():
        yield from found.values()


def weight_shapes(linears: Linears) -> dict[str, tuple[int, int]]:
    """Layer kind -> (out, in) of its weights, as they are stored."""
    first = {kind: next(iter(found.values())).weight for kind, found in linears.items()}
    return {kind: (weight.shape[0], weight.shape[1]) for kind, weight in first.items()}


UPDATED = (torch.float64, torch.float32, torch.bfloat16)


def check_updated(weight: Tensor, what: str) -> None:
    """Raise `UserError` for a dtype in which small updates are lost."""
    if weight.dtype not in UPDATED:
        raise UserError(
            f"{what} in {weight.dtype} loses small updates: load the model in float32, which autocast multiplies in "
            "half precision all the same, or in bfloat16, which is rounded at random"
        )
