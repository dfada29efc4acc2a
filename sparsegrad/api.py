"""Two lines for a model of one's own: calibrate, and get the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sparsegrad.basis import SIDES, Basis
from sparsegrad.calibration.gradients import Batch, calibrate
from sparsegrad.distributed import check_same_weights, unwrapped
from sparsegrad.errors import UserError, check_choice, check_number, renamed_arguments, warn_renamed
from sparsegrad.layers.common import check_linear
from sparsegrad.layers.replace import use_blocks
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.groups import core_groups, param_groups
from sparsegrad.optim.moments import MOMENTS
from sparsegrad.optim.selection import count_kept
from sparsegrad.optim.summary import describe
from sparsegrad.targets import Linears, Names, check_trainable, find_mlp

ENGINES = ("exact", "fast")
logger = logging.getLogger(__name__)


@renamed_arguments(quiet=True, mlp="target_modules")
@renamed_arguments(steps="calibration_steps")
def prepare(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    target_modules: Names | None = None,
    density: float | None = None,
    lr: float = 1e-4,
    *,
    keep: int | None = None,
    calibration_steps: int = 30,
    sides: str = "both",
    moments: str = "dense",
    bases: Mapping[str, Basis] | None = None,
    gram_device: torch.device | str | None = None,
    engine: str = "exact",
    **adamw: Any,
) -> SparseGradAdamW:
    """Calibrate `model` and return the optimizer that fine-tunes it with SparseGrad; then train as ever.

    The MLP weights are SparseGrad; every other parameter that requires a gradient is AdamW, as in the paper: freeze
    before the call what shall not train. `print(describe(optimizer))` tells which weights were taken.

    Args:
        model: called as `model(**batch)`, with a `loss` in its result (see `calibrate`); only engine `fast`
            changes it. It may be inside `DistributedDataParallel`, but for `fast`, where DDP comes afterwards; several
            connected processes calibrate together.
        batches: at least `calibration_steps` mappings of tensors with labels, for calibration only; None with `bases`.
        target_modules: the linears to train: names or ends of names, as in `peft`, or layer kind -> pattern of names,
            or a layout's name; None finds those of known layouts. See `find_mlp`. `mlp=` is an alias.
        density: share of kept entries per weight and step, (0, 1]; default 0.01, the paper's.
        lr: learning rate of all parameters.
        keep: number of kept entries per weight, instead of `density`.
        calibration_steps: batches of the calibration (paper: 30).
        sides: what is rotated: `both` (the method), or only `in`, `out` or `small`, the side with fewer features; not
            exact, a sixth of the rotation.
        moments: `dense` (the method's), or `support`: a tenth of the memory, not exact; see `sparsegrad.optim.moments`.
        bases: layer kind -> basis, as `load_bases` gives them or `optimizer.bases` of an earlier call: taken instead of
            a calibration, which then does not happen. Of them too only `sides` are used.
        gram_device: where the calibration keeps its sums, `cpu` to spare a GPU's memory; None: on the weights' device.
        engine: `exact`, the method; or `fast`, which is NOT the exact method: it trains one fixed block of the rotated
            gradient, not its top entries. Each MLP linear becomes a `BlockLinear`, whose weight is frozen and whose
            core trains; `density` gives its shape, and `weight_decay` acts on the core, not on the weight. Move the
            model to its device before the call; call `to_linears(model)` after training, before saving.
        **adamw: `betas`, `eps`, `weight_decay`, `fused`, `foreach` of `SparseGradAdamW`.

    Raises:
        UserError: for values out of range, or a model without the named linears, or with frozen, tied, quantized or
            sharded ones, or another model on each process, or bases that do not fit it; for what engine `fast` does
            not take (`keep`, `sides`, `moments`, `Conv1D`); before any batch is read. For batches without labels.
    """
    if engine == "merged":
        warn_renamed('engine="exact"', 'engine="exact"')
        engine = "exact"
    _check_options(batches, lr, sides, moments, bases)
    _check_engine(engine, model, keep=keep, sides=sides, moments=moments)
    model = unwrapped(model)
    density = 0.01 if density is None and keep is None else density
    linears = _find(model, target_modules, keep, density, engine)
    SparseGradAdamW(model.parameters(), lr=lr, **adamw)  # refuses what it will refuse, before the calibration
    if bases is None:
        assert batches is not None
        by_kind = {kind: found.values() for kind, found in linears.items()}
        bases = calibrate(model, batches, by_kind, calibration_steps, sides=sides, gram_device=gram_device)
    else:
        check_same_weights(model)
        bases = _fitting(bases, linears, sides)
    if engine == "fast":
        assert density is not None
        groups = core_groups(model, use_blocks(model, linears, bases, density))
    else:
        groups = param_groups(model, linears, bases, keep=keep, density=density, moments=moments)
    optimizer = SparseGradAdamW(groups, lr=lr, **adamw)
    optimizer.model_size = sum(parameter.numel() for parameter in model.parameters())
    logger.info("SparseGrad trains:\n%s", describe(optimizer))
    return optimizer


def _check_options(batches: Any, lr: Any, sides: Any, moments: Any, bases: Any) -> None:
    check_number("lr", lr, above=0)
    check_choice("sides", sides, SIDES)
    check_choice("moments", moments, tuple(MOMENTS))
    if isinstance(batches, Mapping):
        raise UserError("batches is one batch: give several, a list of batches or a DataLoader")
    if batches is None and bases is None:
        raise UserError("batches=None leaves nothing to calibrate on: give batches, or stored bases as bases=")
    if bases is not None and not (isinstance(bases, Mapping) and all(isinstance(b, Basis) for b in bases.values())):
        raise UserError(f"bases is a {type(bases).__name__}: give {{kind: Basis}}, as load_bases reads it from a file")


def _check_engine(engine: Any, model: Any, **options: Any) -> None:
    """A known engine, with options that are its own."""
    if check_choice("engine", engine, ENGINES) == "exact":
        return
    usual = {"keep": None, "sides": "both", "moments": "dense"}
    if other := [f"{name}={options[name]}" for name in usual if options[name] != usual[name]]:
        raise UserError(
            f'engine="fast" does not take {", ".join(other)}: density alone sets its block, and sides="both", '
            'moments="dense" are all it has; leave the others out, or give engine="exact"'
        )
    if unwrapped(model) is not model:
        raise UserError(
            f'engine="fast" puts new layers into the model, which {type(model).__name__} does not see: prepare the '
            "model first and wrap it then"
        )


def _find(model: nn.Module, names: Names | None, keep: int | None, density: float | None, engine: str) -> Linears:
    """The MLP linears, all of which can train, hold the kept entries and suit the engine."""
    linears = find_mlp(model, names)
    check_trainable(linears)
    for found in linears.values():
        for linear in found.values():
            count_kept(linear.weight.shape, keep=keep, density=density)
            if engine == "fast":
                check_linear(linear, 'engine="fast"', 'give engine="exact"')
    return linears


def _fitting(bases: Mapping[str, Basis], linears: Linears, sides: str) -> dict[str, Basis]:
    """The `sides` of the bases of all layer kinds, each of which fits its weights."""
    if bases.keys() != linears.keys():
        raise UserError(
            f"bases are of the kinds {', '.join(bases) or 'none'}, the model's linears of {', '.join(linears)}: give "
            "the bases that were made with the same target_modules=, or calibrate anew"
        )
    for kind, found in linears.items():
        for linear in found.values():
            if not bases[kind].fits(linear.weight.shape):
                raise UserError(
                    f"a basis for {bases[kind].shape} does not fit the weights {tuple(linear.weight.shape)} of kind "
                    f"{kind}: give the bases of this model, or calibrate anew"
                )
    return {kind: bases[kind].only(sides) for kind in linears}


create_sparsegrad_optimizer = (
    prepare  # the name of the form that peft's LoRA variants have (`create_loraplus_optimizer`)
)
