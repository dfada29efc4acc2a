"""Two lines for a model of one's own: calibrate, and get the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.calibration import Batch, calibrate
from sparsegrad.distributed import unwrapped
from sparsegrad.errors import UserError, check_number
from sparsegrad.mlp import Linears, Names, check_trainable, find_mlp
from sparsegrad.optim import SparseGradAdamW
from sparsegrad.plan import describe
from sparsegrad.selection import count_kept

logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    batches: Iterable[Batch],
    mlp: Names | None = None,
    density: float | None = None,
    lr: float = 1e-4,
    *,
    keep: int | None = None,
    steps: int = 30,
    **adamw: Any,
) -> SparseGradAdamW:
    """Calibrate `model` and return the optimizer that fine-tunes it with SparseGrad; then train as ever.

    The MLP weights are SparseGrad; every other parameter that requires a gradient is AdamW, as in the paper: freeze
    before the call what shall not train. `print(describe(optimizer))` tells which weights were taken.

    Args:
        model: called as `model(**batch)`, with a `loss` in its result (see `calibrate`); not changed. It may be inside
            `DistributedDataParallel`; several connected processes calibrate together.
        batches: at least `steps` mappings of tensors with labels, for calibration only.
        mlp: layer kind -> pattern of module names, or a list of names, or a layout's name; None finds those of known
            layouts. See `find_mlp`.
        density: share of kept entries per weight and step, (0, 1]; default 0.01, the paper's.
        lr: learning rate of all parameters.
        keep: number of kept entries per weight, instead of `density`.
        steps: calibration steps (paper: 30).
        **adamw: `betas`, `eps`, `weight_decay`, `fused`, `foreach` of `SparseGradAdamW`.

    Raises:
        UserError: for values out of range, or a model without the named linears, or with frozen, tied, quantized or
            sharded ones, or another model on each process; before any batch is read. For batches without labels.
    """
    model = unwrapped(model)
    density = 0.01 if density is None and keep is None else density
    check_number("lr", lr, above=0)
    if isinstance(batches, Mapping):
        raise UserError("batches is one batch: give several, a list of batches or a DataLoader")
    linears = find_mlp(model, mlp)
    check_trainable(linears)
    for found in linears.values():
        for linear in found.values():
            count_kept(linear.weight.shape, keep=keep, density=density)
    SparseGradAdamW(model.parameters(), lr=lr, **adamw)  # refuses what it will refuse, before the calibration
    bases = calibrate(model, batches, {kind: found.values() for kind, found in linears.items()}, steps)
    optimizer = SparseGradAdamW(param_groups(model, linears, bases, keep=keep, density=density), lr=lr, **adamw)
    logger.info("SparseGrad trains:\n%s", describe(optimizer))
    return optimizer


def param_groups(
    model: nn.Module,
    linears: Linears,
    bases: Mapping[str, Basis | None],
    *,
    keep: int | None = None,
    density: float | None = None,
    moments: str = "dense",
) -> list[dict[str, Any]]:
    """Groups for `SparseGradAdamW`: one per layer kind, and one for all else that requires a gradient.

    Each group carries the names of its parameters as `param_names`, and those of MLP weights their `kind`.
    """
    kinds = {id(linear.weight): kind for kind, found in linears.items() for linear in found.values()}
    named: dict[str | None, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in linears}
    for name, parameter in model.named_parameters():
        kind = kinds.get(id(parameter))
        if kind is not None or parameter.requires_grad:
            named.setdefault(kind, []).append((name, parameter))
    rest = named.pop(None, [])
    groups: list[dict[str, Any]] = [
        {
            "params": named[kind],
            "kind": kind,
            "basis": bases[kind],
            "keep": keep,
            "density": density,
            "moments": moments,
        }
        for kind in linears
    ]
    return [*groups, {"params": rest}] if rest else groups
