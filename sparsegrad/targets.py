"""Which weights SparseGrad trains: the MLP linears of a model by layer kind, found by their module names.

`LAYOUTS` has the known layouts, and `find_mlp` the rules for names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsegrad.arguments import explained
from sparsegrad.distributed import refuse_fsdp1
from sparsegrad.errors import UserError, renamed_arguments
from sparsegrad.targets_blocks import refuse_partial
from sparsegrad.targets_errors import describe_linears, explain_missing, explain_unknown_layout, is_linear

# Layer kind -> pattern that must match the whole module name. Many families share names: Gemma, Phi-1 and others are
# found by the names of a family listed here. ViT has BERT's names in transformers 5.3 and `mlp.fc1` in 5.23.
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

It may also hold GPT-2's `Conv1D`, whose weight is (in, out). Its basis is that of the linear with the two matrices
exchanged. The method treats rows and columns alike, so it keeps the same entries.
"""
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
Names = Mapping[str, str] | Sequence[str] | str


@renamed_arguments(quiet=True, mlp="target_modules")
@explained()
def find_mlp(model: nn.Module, target_modules: Names | None = None) -> Linears:
    """Find the MLP linears of `model` by kind.

    Args:
        model: any module; only its module names matter.
        target_modules: None detects the one layout of `LAYOUTS` that matches the model's names, in every block.
            Otherwise the name of a layout; a mapping from layer kind to a regular expression for the whole module name;
            or a list of module names or their ends, as in `peft`, where names form one kind if they differ only in
            parts that are numbers (`layers.*.mlp.up_proj`), other than that of a linear in an `nn.Sequential`
            (`layers.*.mlp.0`); a mapping can make one kind of them. `mlp=` is an alias.

    Returns:
        Layer kind -> module name -> linear. All weights of a kind have one shape.

    Raises:
        UserError: for an unknown or ambiguous layout, a detected one that some blocks lack, an invalid expression, a
            kind without linears or with mixed shapes, a module of two kinds, a quantized or sharded weight, or one
            that other modules share.
    """
    # Before the search, as frozen weights and flat parameters would give misleading errors.
    _refuse_peft(model)
    refuse_fsdp1(model)
    named = _resolve_names(model, target_modules)
    _refuse_overlap(named)
    if missing := [kind for kind, names in named.items() if not names]:
        raise explain_missing(model, missing[0], target_modules)
    linears = {kind: _get_linears(model, kind, names) for kind, names in named.items()}
    _refuse_shared(model, linears)
    return linears


def check_trainable(linears: Linears) -> None:
    """Raise `UserError` for a weight that cannot train: frozen, without values, or in float16, which loses updates."""
    for found in linears.values():
        for name, linear in found.items():
            if not linear.weight.requires_grad:
                raise UserError(
                    f"{name}.weight is frozen (requires_grad=False): call requires_grad_(True) on it, or name only "
                    "the other linears with target_modules=[...]"
                )
            if linear.weight.is_meta:
                raise UserError(
                    f"{name}.weight has no values (device meta): load the model with its weights, and without "
                    "offloading, such as with device_map=None"
                )
            check_updated(linear.weight, f"{name}.weight")


def _resolve_names(model: nn.Module, names: Names | None) -> dict[str, list[str]]:
    """Layer kind -> module names, which may turn out to be something other than linears."""
    if names is None:
        return _match_patterns(model, _detect_layout(model))
    if isinstance(names, str):
        if names not in LAYOUTS:
            raise explain_unknown_layout(model, names, LAYOUTS)
        return _match_patterns(model, LAYOUTS[names])
    if isinstance(names, Mapping) and names and all(isinstance(pattern, str) for pattern in names.values()):
        return _match_patterns(model, names)
    if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
        return _match_ends(model, names)
    raise UserError(
        f"target_modules={names} names no layer kind: give {{kind: pattern}}, a list of module names, or one of "
        f"{', '.join(LAYOUTS)}"
    )


def _detect_layout(model: nn.Module) -> dict[str, str]:
    """The one layout of which the model has every kind, in all of its blocks."""
    # Several names share one layout (BERT, RoBERTa, ...): keep each layout once, under its first name.
    distinct = {tuple(layout.values()): (name, layout) for name, layout in reversed(LAYOUTS.items())}
    fitting = dict(pair for pair in distinct.values() if all(_match_patterns(model, pair[1]).values()))
    if not fitting:
        raise UserError(
            f"{type(model).__name__} has the MLP names of no known layout ({', '.join(LAYOUTS)}): give "
            f"target_modules=[...] with the names of the linears to train; {describe_linears(model)}"
        )
    if len(fitting) > 1:
        raise UserError(
            f"{type(model).__name__} fits the layouts {', '.join(fitting)}: choose one of them as target_modules="
        )
    ((name, layout),) = fitting.items()
    refuse_partial(model, name, layout, _match_patterns(model, layout))
    return layout


def _match_patterns(model: nn.Module, patterns: Mapping[str, str]) -> dict[str, list[str]]:
    """Layer kind -> names of the modules that its pattern matches."""
    named: dict[str, list[str]] = {}
    for kind, pattern in patterns.items():
        try:
            matches = re.compile(pattern).fullmatch
        except re.error as error:
            raise UserError(f"target_modules.{kind}={pattern} is not a regular expression: {error}") from None
        named[kind] = [name for name, _ in model.named_modules() if matches(name)]
    return named


def _match_ends(model: nn.Module, wanted: Sequence[str]) -> dict[str, list[str]]:
    """Names of modules by kind, for a list of names or ends of names."""
    named: dict[str, list[str]] = {}
    for end in wanted:
        found = [name for name, _ in model.named_modules() if name == end or name.endswith(f".{end}")]
        if not found:
            named[end] = []  # an empty kind: `find_mlp` reports it
        for name in found:
            kind = _name_kind(model, name)
            named.setdefault(kind, [])
            if name not in named[kind]:
                named[kind].append(name)
    return named


def _name_kind(model: nn.Module, name: str) -> str:
    """The name with * for the numbers of a list's items, and without the parts that wrappers add.

    The linears of an `nn.Sequential` keep their numbers: they are different layers of one MLP.
    """
    parts, found = name.split("."), []
    for number, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:number]))
        is_wrapper = part == "_orig_mod" or (part == "module" and isinstance(parent, _PARALLEL))
        is_layer = isinstance(parent, nn.Sequential) and number == len(parts) - 1
        if not is_wrapper:
            found.append("*" if part.isdigit() and not is_layer else part)
    return ".".join(found)


def _refuse_peft(model: nn.Module) -> None:
    """Raise `UserError` for a model of peft: it has other names, and its weights are frozen on purpose."""
    # Recognized by where the classes come from, so that the library does not depend on peft. transformers' own
    # `add_adapter` wraps single linears too, in a model of an ordinary class.
    wrapped = [name for name, module in model.named_modules() if type(module).__module__.split(".")[0] == "peft"]
    if wrapped:
        layer = next((name for name in wrapped if hasattr(model.get_submodule(name), "base_layer")), None)
        raise UserError(
            f"{layer or type(model).__name__} is wrapped by peft: give the plain model, which unload() or "
            "merge_and_unload() of the peft model returns, and call requires_grad_(True) on it, as peft has frozen it"
        )


def _refuse_overlap(named: Mapping[str, list[str]]) -> None:
    """Raise `UserError` for a module of two kinds: both bases would rotate it."""
    taken: dict[str, str] = {}
    for kind, names in named.items():
        for name in names:
            if name in taken:
                raise UserError(
                    f"{name} is of two kinds, {taken[name]} and {kind}: write patterns of which only one matches it"
                )
            taken[name] = kind


def _get_linears(model: nn.Module, kind: str, names: list[str]) -> dict[str, nn.Linear]:
    """The modules of `names`, after a check that they are linears of one shape."""
    found = {name: _check_module(name, model.get_submodule(name)) for name in names}
    shapes = {tuple(linear.weight.shape) for linear in found.values()}
    if len(shapes) > 1:
        raise UserError(
            f"kind {kind} matches weights of shapes {sorted(shapes)}: name one kind per shape, as target_modules="
            "{kind: pattern of names}"
        )
    return found


def _check_module(name: str, module: nn.Module) -> nn.Linear:
    """Return `module` if it is a linear or a `Conv1D` with a weight of its own, or raise `UserError`."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and is_quantized(weight):
        raise UserError(
            f"{name}.weight is quantized ({type(weight).__name__}, {weight.dtype}): SparseGrad changes the weight "
            "itself; load the model in float32 or bfloat16, or use LoRA for a quantized one"
        )
    if is_linear(module):
        _refuse_reparametrized(name, module)
        return module  # type: ignore[return-value]
    if hasattr(module, "to_linear"):  # a layer of this library, from an earlier `prepare`
        raise UserError(f"{name} is a {type(module).__name__} already: call sparsegrad.to_linears(model) first")
    inside = next((f", such as {name}.{child}" for child, one in module.named_modules() if is_linear(one)), "")
    raise UserError(
        f"{name} is a {type(module).__name__}, not a linear with a weight of its own: name only linears{inside}"
    )


def _refuse_reparametrized(name: str, module: nn.Module) -> None:
    """Raise `UserError` for a weight that is computed anew from other parameters, such as by `weight_norm`."""
    if isinstance(module.weight, nn.Parameter):
        return
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        remove = "parametrize.remove_parametrizations(module, 'weight')"
    else:
        ways = {"g": "remove_weight_norm(module)", "u": "remove_spectral_norm(module)"}
        found = (way for end, way in ways.items() if hasattr(module, f"weight_{end}"))
        remove = next(found, "prune.remove(module, 'weight')")
    raise UserError(
        f"{name}.weight is computed from other parameters, as by weight_norm or pruning, and cannot train itself: call "
        f"torch.nn.utils.{remove} with module=model.get_submodule('{name}') first, or name only the other linears with "
        "target_modules=[...]"
    )


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is quantized, in any of the common ways.

    bitsandbytes marks its 4-bit weights by `quant_state`, torchao uses its own tensor classes, and others store
    integers or float8.
    """
    torchao = type(weight.data).__module__.startswith("torchao")
    narrow = not weight.dtype.is_floating_point or torch.finfo(weight.dtype).bits < 16
    return torchao or narrow or hasattr(weight, "quant_state")


def _refuse_shared(model: nn.Module, linears: Linears) -> None:
    """Raise `UserError` for a weight with several names: training it under one name would change all."""
    if names := find_tied(model, {f"{name}.weight" for found in linears.values() for name in found}):
        raise UserError(f"one weight is tied under the names {', '.join(names)}: untie it, or leave it out")


def find_tied(model: nn.Module, wanted: Collection[str]) -> list[str]:
    """All names of the first parameter that has several, one of them in `wanted`; empty if there is none."""
    named: dict[int, list[str]] = {}
    # With duplicates: by default torch lists a tied parameter only under its first name.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)
    return next((names for names in named.values() if len(names) > 1 and not set(names).isdisjoint(wanted)), [])


def all_linears(linears: Linears) -> Iterator[nn.Linear]:
    """Every MLP linear of every kind."""
    for found in linears.values():
        yield from found.values()


def weight_shapes(linears: Linears) -> dict[str, tuple[int, int]]:
    """Layer kind -> shape of its weights as stored: (out, in), or (in, out) for `Conv1D`."""
    first = {kind: next(iter(found.values())).weight for kind, found in linears.items()}
    return {kind: (weight.shape[0], weight.shape[1]) for kind, weight in first.items()}


UPDATED = (torch.float64, torch.float32, torch.bfloat16)  # dtypes in which small updates add up


def check_updated(weight: Tensor, what: str) -> None:
    """Raise `UserError` for a dtype in which small updates are lost.

    float16 has 10 bits of mantissa and no stochastic rounding here: most steps of fine-tuning would round to no change.
    """
    if weight.dtype not in UPDATED:
        raise UserError(
            f"{what} in {weight.dtype} loses small updates: load the model in float32, which autocast still multiplies "
            "in half precision, or in bfloat16, which is rounded stochastically"
        )
