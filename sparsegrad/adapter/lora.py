"""Save as a LoRA adapter: write what training changed as an ordinary peft LoRA adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from sparsegrad.adapter.base import (
    Base,
    check_plain,
    get_class_name,
    name_base,
    read_base,
    refuse_other_format,
    write_gathered,
)
from sparsegrad.adapter.changes import find_changed, list_trainable
from sparsegrad.adapter.format import FACTS
from sparsegrad.adapter.lora_card import SavedLora, write_lora_card
from sparsegrad.adapter.lora_files import write_lora
from sparsegrad.adapter.lora_layout import Layout, is_transposed, make_config, plan_layout, takes_lora
from sparsegrad.adapter.low_rank import Factors, factor_block, subtract, truncate
from sparsegrad.arguments import explained
from sparsegrad.distributed import refuse_fsdp1, unwrap_compiled
from sparsegrad.errors import UserError, check_integer, check_number, renamed_arguments
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.common import make_linear
from sparsegrad.layers.replace import replace_module
from sparsegrad.targets import Names, find_mlp, find_tied, is_quantized

_PREFIX = "base_model.model."  # what peft puts before the names of the model
Blocks = Mapping[str, BlockLinear]


@renamed_arguments(quiet=True, mlp="target_modules")
@explained({"optimizer": "leave it out, since the change from the base is all that is stored"})
@write_gathered
def save_lora(
    model: nn.Module,
    folder: str | Path,
    base: Base | None = None,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    target_modules: Names | None = None,
) -> SavedLora:
    """Write what training changed in `model` to `folder` as a LoRA adapter that `PeftModel.from_pretrained` loads.

    The change of each linear is stored as B A with scaling 1. After engine `fast` this is exact: its layers hold the
    factors, of rank min(c, r) for a core (c, r). Any other change is truncated by an SVD to `rank` or to `max_error`.
    Changed biases of these linears become `lora_bias`. Every other module that changed, such as a head, a LayerNorm or
    an embedding, is stored whole in `modules_to_save`.

    There is no `optimizer` argument as in `save_adapter`: the layers of engine `fast` know their factors, and for all
    other weights only the change matters, not how it was trained.

    Args:
        model: the trained model. After engine `fast`, call it before `to_linears`. While it runs, the layers are
            replaced by linears that share their weights; they are put back afterwards. If FSDP2 shards the model, all
            processes call this together, and the main process gathers the weights and writes.
        folder: created if needed. An existing LoRA adapter is replaced, but a README.md that was written or edited by
            hand is not.
        base: the model before training, as for `save_adapter`.
        rank: rank of every truncated change. Give `rank` or `max_error`, not both. With engine `fast` neither is
            needed; linears outside the cores are then stored whole.
        max_error: largest relative error of a truncated change (Frobenius norm), from 1e-6 to below 1. Each linear has
            the smallest rank that satisfies it. vLLM and llama.cpp expect one rank for all: give `rank` for them.
        target_modules: the linears whose change is truncated, as given to `prepare`; all other changes are stored
            whole. None: every linear that changed, except new ones, heads that peft stores whole for the model's task,
            and those whose shorter side is below `rank`. `mlp=` is an alias.

    Returns:
        Rank and relative error of each linear, and the names of the modules that are stored whole.

    Raises:
        UserError: for `rank` or `max_error` out of range; a base that cannot be loaded, is of another model or shares
            memory with this one; a model that equals its base, is wrapped or sharded by FSDP1; weights that are tied,
            quantized or not finite; a change that peft cannot store; or a folder that holds an adapter of
            `save_adapter`, or cannot be written, which keeps its old adapter.
    """
    refuse_other_format(Path(folder), FACTS, "an adapter of save_adapter")
    return write_matrices(model, folder, base, rank=rank, max_error=max_error, target_modules=target_modules)


def write_matrices(
    model: nn.Module,
    folder: str | Path,
    base: Base | None = None,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    target_modules: Names | None = None,
) -> SavedLora:
    """As `save_lora`, for a model without shards; an adapter of `save_adapter` stays, except for its card."""
    model = unwrap_compiled(model)
    refuse_fsdp1(model)
    with _plain_linears(model) as blocks:
        _check_options(blocks, rank, max_error, target_modules)
        check_plain(model)
        _refuse_quantized(model)
        named = {} if target_modules is None else _find_named(model, target_modules, rank)
        before, new = read_base(model, base, _expect_names(model, base, {**named, **blocks}))
        trained = list_trainable(model) | {f"{name}.weight" for name in blocks}
        changed = set(find_changed(model, before, new, trained))
        _refuse_tied(model, changed)
        layout = _plan(model, changed, new, blocks, None if target_modules is None else named, rank, max_error)
        factors = {name: _factor(model, name, before, blocks, rank, max_error) for name in layout.targets}
        tensors, whole = _name_factors(model, before, layout, factors), _name_whole(model, layout)
        ranks = {name: found.rank for name, found in factors.items()}
        source = name_base(model, base)
        write_lora(Path(folder), make_config(model, layout, ranks, source), {**tensors, **whole})
    errors = {name: found.error for name, found in factors.items()}
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in (tensors, whole)]
    saved = SavedLora(Path(folder), ranks, errors, tuple(layout.whole), layout.bias, *sizes)
    write_lora_card(saved, source, get_class_name(model))
    return saved


def check_changes(
    model: nn.Module,
    changed: set[str],
    new: set[str],
    blocks: Collection[str],
    rank: int | None,
    max_error: float | None,
) -> None:
    """Check before a training what `save_lora` could only refuse after it.

    Args:
        model: with plain linears; their values do not matter.
        changed: names of the tensors that will change.
        new: those of them that the base does not have.
        blocks: names of the layers that engine `fast` makes.
        rank, max_error: as for `save_lora`.

    Raises:
        UserError: for changes that peft cannot store, whatever their values.
    """
    _refuse_tied(model, changed)
    _plan(model, changed, new, blocks, None, rank, max_error)


@contextmanager
def _plain_linears(model: nn.Module) -> Iterator[Blocks]:
    """Replace each `BlockLinear` by a linear that shares its weight and bias, and undo it at the end.

    So the model has the names of its base, without a copy of its weights. Yields the layers by name.
    """
    # With duplicates, so that every name of a shared layer is replaced.
    modules = list(model.named_modules(remove_duplicate=False))
    blocks = {name: module for name, module in modules if name and isinstance(module, BlockLinear)}
    linears: dict[int, nn.Linear] = {}
    try:
        for name, block in blocks.items():
            block.merge(force=True)  # also what was written through `.data`
            if id(block) not in linears:
                linears[id(block)] = make_linear(block.weight, block.bias)
            replace_module(model, name, linears[id(block)])
        yield blocks
    finally:
        for name, block in blocks.items():
            replace_module(model, name, block)


def _check_options(blocks: Blocks, rank: int | None, max_error: float | None, names: Names | None) -> None:
    if rank is not None and max_error is not None:
        raise UserError(f"rank={rank} and max_error={max_error}: give one of them, since each determines the other")
    if rank is not None:
        check_integer("rank", rank, at_least=1)
    elif max_error is not None:
        check_number("max_error", max_error, at_least=1e-6, below=1, remedy="float32 stores nothing more exact")
    elif not blocks:
        raise UserError(
            "rank=None and max_error=None: give one of them; only the layers of engine fast know their rank, so call "
            "save_lora before to_linears"
        )
    elif names is not None:
        raise UserError(f"target_modules={names} needs rank= or max_error=: engine fast knows its own linears")


def _refuse_quantized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and is_quantized(weight):
            raise UserError(
                f"{name}.weight is quantized ({weight.dtype}), so its change cannot be computed: dequantize the model "
                "and its base"
            )


def _find_named(model: nn.Module, names: Names, rank: int | None) -> dict[str, nn.Module]:
    """The linears that `target_modules` names; their shorter sides must be at least `rank`."""
    named: dict[str, nn.Module] = {
        name: one for found in find_mlp(model, names).values() for name, one in found.items()
    }
    for name in named if rank is not None else ():
        shorter = _shorter_side(model, name)
        check_integer("rank", rank, at_least=1, at_most=shorter, remedy=f"the shorter side of {name} is {shorter}")
    return named


def _shorter_side(model: nn.Module, name: str) -> int:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return min(weight.shape)


def _expect_names(model: nn.Module, base: Base | None, named: Mapping[str, nn.Module]) -> dict[str, str]:
    """Names of weights that the base must have; `read_base` refuses a base of another architecture by them."""
    if not named and not isinstance(base, Mapping):
        named = {name: module for name, module in model.named_modules() if takes_lora(module)}
    return {f"{name}.weight": "" for name in named}


def _refuse_tied(model: nn.Module, changed: Collection[str]) -> None:
    """Raise `UserError` for a changed tensor with several names: peft would change it under one of them."""
    if names := find_tied(model, changed):
        raise UserError(
            f"one weight is tied under the names {', '.join(names)}, and it changed: peft would change it under one "
            "name only; freeze it before training, or use sparsegrad.save_adapter"
        )


def _plan(
    model: nn.Module,
    changed: set[str],
    new: set[str],
    blocks: Collection[str],
    named: Mapping[str, nn.Module] | None,
    rank: int | None,
    max_error: float | None,
) -> Layout:
    """The layout, with the linears that get LoRA matrices; see `target_modules` of `save_lora`."""
    linears = [name for name, module in model.named_modules() if takes_lora(module)]
    chosen = {name for name in linears if f"{name}.weight" in changed - new}
    if named is not None:
        chosen &= {*named, *blocks}
    elif rank is None and max_error is None:
        chosen &= set(blocks)
    elif rank is not None:
        chosen = {name for name in chosen if name in blocks or rank <= _shorter_side(model, name)}
    layout = plan_layout(model, changed, [name for name in linears if name in chosen], {*blocks, *(named or {})})
    if not layout.targets:
        raise _explain_nothing(rank, max_error)
    return layout


def _explain_nothing(rank: int | None, max_error: float | None) -> UserError:
    """The error where no linear gets LoRA matrices."""
    if rank is None and max_error is None:
        return UserError(
            "no core of a fast linear has changed: train before saving, give rank= to approximate the changes of "
            "other linears, or use sparsegrad.save_adapter"
        )
    return UserError(
        f"rank={rank}, max_error={max_error}: no linear that changed can have LoRA matrices. Its weight must be in "
        "the base, and its shorter side at least the rank: give a smaller rank, or use sparsegrad.save_adapter"
    )


def _factor(
    model: nn.Module,
    name: str,
    before: Mapping[str, Tensor],
    blocks: Blocks,
    rank: int | None,
    max_error: float | None,
) -> Factors:
    linear = model.get_submodule(name)
    weight = linear.weight
    assert isinstance(weight, Tensor)
    change = subtract(weight, before[f"{name}.weight"], is_transposed(linear))
    if name in blocks:
        return factor_block(name, blocks[name], change)
    return truncate(change, weight.dtype, rank, max_error)


def _name_factors(
    model: nn.Module, before: Mapping[str, Tensor], layout: Layout, factors: Mapping[str, Factors]
) -> dict[str, Tensor]:
    """The LoRA matrices under peft's names, and with `lora_bias` the change of each bias (out,)."""
    tensors = {}
    for name, found in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = found.A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = found.B
        if layout.bias:
            bias = model.get_submodule(name).bias
            assert isinstance(bias, Tensor)
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = subtract(bias, before[f"{name}.bias"], False).to(found.B).cpu()
    return tensors


def _name_whole(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Copies of the tensors of `modules_to_save` under peft's names."""
    states = {name: model.get_submodule(name).state_dict() for name in layout.whole}
    # Cloned, since safetensors refuses tensors that share memory.
    return {
        f"{_PREFIX}{name}.{part}": tensor.detach().cpu().contiguous().clone()
        for name, state in states.items()
        for part, tensor in state.items()
    }
