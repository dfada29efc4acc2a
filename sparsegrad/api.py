"""The two-line entry point: `prepare` calibrates a model and returns its optimizer.

It finds the weights (`targets`), computes their bases (`calibration`), changes the model for the engine (`layers`) and
makes the parameter groups (`optim`).
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.arguments import explained
from sparsegrad.basis import SIDES, Basis
from sparsegrad.calibration.gradients import Progress, calibrate, take_batches
from sparsegrad.calibration.inputs import refuse_one_batch
from sparsegrad.calibration.loss import Batch
from sparsegrad.distributed import check_same_weights, is_managed, is_shard, refuse_shards, reshard, unwrapped
from sparsegrad.errors import UserError, check_choice, check_integer, renamed_arguments, warn_renamed
from sparsegrad.layers.common import check_linear
from sparsegrad.layers.replace import refuse_own_function, rotate_gradients, use_blocks
from sparsegrad.layers.shards import check_shards
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.group_checks import check_rate
from sparsegrad.optim.groups import core_groups, param_groups
from sparsegrad.optim.moments import MOMENTS
from sparsegrad.optim.orders import ORDERS
from sparsegrad.optim.release import refuse_released
from sparsegrad.optim.rest import check_rest, find_saved, freeze_rest, outside, refuse_freezing, set_rest_rate
from sparsegrad.optim.rotation import check_rotation_dtype
from sparsegrad.optim.selection import count_kept
from sparsegrad.optim.summary import count_parameters, describe
from sparsegrad.targets import Linears, Names, all_linears, check_trainable, find_mlp

ENGINES = ("exact", "fast")
# Options that engine `fast` does not have, with the value that they must have there.
_FAST_DEFAULTS = {"keep": None, "sides": "both", "moments": "dense", "rotation_order": "auto", "rotation_dtype": None}
_ELSEWHERE = "engine layer is in run.py (method.engine=layer) and as the layer sparsegrad.SparseGradLinear only"
_NO_RANK = "SparseGrad has no rank; density= sets the share of each weight's entries that trains, keep= their number"
# Words of peft and transformers that no argument means.
_NOTES = {
    **dict.fromkeys(("r", "rank"), _NO_RANK),
    **dict.fromkeys(("lora_alpha", "alpha"), "SparseGrad scales no update; lr= sets how far a step goes"),
    "exclude_modules": "name the modules that are to train in target_modules=",
    "lora_dropout": "leave it out, since SparseGrad adds no layers",
    "bias": "biases train with everything else, unless train_rest=False freezes it",
    **dict.fromkeys(
        ("num_train_epochs", "max_steps", "batch_size", "warmup_steps", "lr_scheduler_type", "max_grad_norm"),
        "leave it to your training loop or to the Trainer; prepare only calibrates and returns the optimizer",
    ),
}
_ADAMW = [name for name in inspect.signature(SparseGradAdamW).parameters if name not in ("params", "lr")]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What `prepare` was given on how the linears train; see there."""

    engine: str
    keep: int | None
    density: float | None
    sides: str
    moments: str
    rotation_order: str
    rotation_dtype: torch.dtype | None
    decay_vectors: bool


@renamed_arguments(steps="calibration_steps")  # outermost, so that its warning shows the user's line
@renamed_arguments(quiet=True, mlp="target_modules")
@explained(_NOTES, more=_ADAMW)
def prepare(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    target_modules: Names | None = None,
    density: float | None = None,
    lr: float | Tensor = 1e-4,
    *,
    keep: int | None = None,
    calibration_steps: int = 30,
    sides: str = "both",
    moments: str = "dense",
    bases: Mapping[str, Basis] | None = None,
    gram_device: torch.device | str | None = None,
    engine: str = "exact",
    rotation_order: str = "auto",
    rotation_dtype: torch.dtype | None = None,
    train_rest: bool = True,
    modules_to_save: Sequence[str] | None = None,
    rest_lr: float | Tensor | None = None,
    decay_vectors: bool = True,
    progress: Progress | None = None,
    **adamw: Any,
) -> SparseGradAdamW:
    """Calibrate `model` and return the optimizer that fine-tunes it with SparseGrad.

    The optimizer trains the MLP weights with SparseGrad and, as in the paper, every other parameter that requires a
    gradient with AdamW. Freeze whatever should not train before the call, or give `train_rest=False`. Then train with
    any loop. Layers that are unfrozen later train after `optimizer.add_param_group({"params": list(of them)})`.
    `print(describe(optimizer))` lists the weights that were found.

    Args:
        model: called as `model(**batch)`; its result must have a `loss` (see `calibrate`). With engine `exact` its
            function and state dict stay the same, but `weight.grad` of the linears that train becomes a rotated
            gradient, see `rotation_order`. The model may be wrapped in `DistributedDataParallel`, except with engine
            `fast` or where `train_rest=False` freezes something: DDP has to wrap the prepared model there. With engine
            `fast` it may be sharded by FSDP2, before or after the call. Several connected processes calibrate together.
        batches: at least `calibration_steps` mappings of tensors with labels, used for calibration only; None with
            `bases`. Gradients that the target weights have from before the call are deleted.
        target_modules: the linears to train: names or ends of names, as in `peft`; a mapping from layer kind to a
            pattern of names; or the name of a known layout. None detects the layout. See `find_mlp`. `mlp=` is an
            alias.
        density: share of kept entries per weight and step, in (0, 1]; default 0.01, as in the paper.
        lr: learning rate of all parameters; see `rest_lr`.
        keep: number of kept entries per weight, instead of `density`.
        calibration_steps: number of calibration batches (paper: 30).
        sides: which sides are rotated: `both` (the method), or only `in`, `out` or `small`, the side with fewer
            features. `small` costs a sixth of the rotation for weights of 4 to 1, as in BERT, and about a fifth in
            LLaMA, but is not the exact method.
        moments: `dense` (the method), or `support`, which uses a tenth of the memory but is not exact; see
            `sparsegrad.optim.moments`.
        bases: layer kind -> basis, from `load_bases` or from `optimizer.bases` of an earlier call. They replace the
            calibration. Only the part that `sides` selects is used.
        gram_device: device of the calibration's Gram matrices; `cpu` saves GPU memory, None uses the weights' device.
        engine: `exact`, the method; or `fast`, which is NOT the exact method: it trains one fixed block of the rotated
            gradient instead of its largest entries. It replaces each MLP linear by a `BlockLinear`, whose weight is
            frozen and whose core trains. `density` sets the size of the core, and `weight_decay` acts on the core
            instead of the weight. Move the model to its device before the call, and call `to_linears(model)` after
            training, before saving.
        rotation_order: how engine `exact` computes rotated gradients. With `auto` the linears do it during
            back-propagation, in the cheapest order of products for the number of tokens, and leave the result in
            `weight.grad`. Accumulation, DDP, clipping by the 2-norm and `GradScaler` mean the same as before. What adds
            a plain gradient does not, such as a penalty on the weights in the loss (L2-SP, EWC), nor does what reads
            single entries of `weight.grad` or moves the weight along it: clipping by value, by another norm or by unit
            (AGC), SAM, Fisher information, gradient surgery by entry. These need `gradient`, where `weight.grad` is the
            plain gradient and the optimizer rotates it, as it does for `Conv1D` in any case. Errors are raised for a
            penalty, except on layers that `torch.compile` compiled, which cannot tell its gradient from theirs; for
            clipping by value, if it leaves many equal entries in step 1, 2, 4, 8 and so on; and for a step of another
            optimizer. The other uses are not noticed. `tokens`, `inputs` and `outputs` are the other orders, for
            measurements.
        rotation_dtype: `torch.bfloat16` rotates gradients in bfloat16 with sums in float32, on hardware that has it. It
            rounds, so that a few of the kept entries differ. None: the dtype of the weights, at least float32.
        train_rest: whether everything outside the target weights trains that requires a gradient (the paper). False
            freezes it (`requires_grad=False`), except for `modules_to_save`.
        modules_to_save: with `train_rest=False`, and then required: the modules that train whole, as in `peft`: names
            or ends of names, such as `["classifier"]` for a new head; `[]` for none.
        rest_lr: learning rate of everything outside the target weights; None: `lr`, as in the paper. A group that is
            added later has the rate and the decay that it is given, by default `lr` and `weight_decay`.
        decay_vectors: whether `weight_decay` acts on parameters with fewer than two dimensions, too, which are biases
            and normalization. False leaves them out, as transformers' Trainer does.
        progress: shows the progress of the calibration with the remaining time, e.g. `tqdm`; see `calibrate`.
        **adamw: `betas`, `eps`, `weight_decay`, `fused`, `foreach` of `SparseGradAdamW`.

    Raises:
        UserError: before any batch is read, for an unknown argument; values out of range; a model without the named
            linears; weights that are frozen, tied, quantized or sharded, or whose gradients an optimizer releases;
            models that differ between processes; bases that do not fit; `modules_to_save` that do not exist; a model
            inside DDP where `train_rest=False` freezes something; gradients that are switched off; or what engine
            `fast` does not support (`keep`, `sides`, `moments`, `rotation_order`, `rotation_dtype`, `Conv1D`). During
            calibration, for too few batches or batches without labels.
    """
    if engine == "merged":
        warn_renamed('engine="merged"', 'engine="exact"')
        engine = "exact"
    options = _Options(
        engine=engine,
        keep=keep,
        density=0.01 if density is None and keep is None else density,
        sides=sides,
        moments=moments,
        rotation_order=rotation_order,
        rotation_dtype=rotation_dtype,
        decay_vectors=decay_vectors,
    )
    _check_arguments(batches, lr, bases, calibration_steps, options)
    check_rest(train_rest, modules_to_save, rest_lr, decay_vectors)
    _check_engine(model, options)
    given, model = model, unwrapped(model)  # names, and back-propagation without DDP's gradient averaging
    linears = _find_linears(model, target_modules, options)
    rest, saved = outside(model, linears), find_saved(model, modules_to_save or ())
    if given is not model and not train_rest:
        refuse_freezing(model, rest, saved)
    # Calibration may take minutes: construct a throwaway optimizer first, so that bad options fail before it.
    SparseGradAdamW(model.parameters(), lr=lr, **adamw)
    if bases is None:
        assert batches is not None
        taken = take_batches(batches, calibration_steps, "calibration_steps")  # too few: names this argument
        bases = calibrate(
            model, taken, linears, calibration_steps, sides=sides, gram_device=gram_device, progress=progress,
            # Ordinary linears, as this order has them in training, too.
            drop_padding=rotation_order != "gradient",
        )  # fmt: skip
    else:
        check_same_weights(model)  # `calibrate` checks this in the other case
        bases = _fit_bases(bases, linears, sides)
    if not train_rest:
        freeze_rest(model, rest, saved)
    optimizer = SparseGradAdamW(_make_groups(model, linears, bases, options), lr=lr, **adamw)
    optimizer.model, optimizer.model_size = weakref.ref(model), count_parameters(model)
    if rest_lr is not None:
        set_rest_rate(optimizer, rest, rest_lr)
    logger.info("SparseGrad trains:\n%s", describe(optimizer))
    return optimizer


def _check_arguments(batches: Any, lr: Any, bases: Any, calibration_steps: Any, options: _Options) -> None:
    """Check what needs no model."""
    check_rate("lr", lr)
    check_choice("sides", options.sides, SIDES)
    check_choice("moments", options.moments, tuple(MOMENTS))
    refuse_one_batch(batches)
    if bases is None:
        check_integer("calibration_steps", calibration_steps, at_least=1, remedy="the paper uses 30")
    if batches is None and bases is None:
        raise UserError("batches=None leaves nothing to calibrate on: give batches, or stored bases as bases=")
    if bases is not None and not (isinstance(bases, Mapping) and all(isinstance(b, Basis) for b in bases.values())):
        raise UserError(f"bases is a {type(bases).__name__}: give {{kind: Basis}}, as load_bases reads it from a file")
    check_choice("rotation_order", options.rotation_order, ORDERS)


def _check_engine(model: Any, options: _Options) -> None:
    """Check that the engine is known and supports the other options."""
    remedy = _ELSEWHERE if options.engine == "layer" else ""
    if check_choice("engine", options.engine, ENGINES, remedy) == "exact":
        return
    given = {name: getattr(options, name) for name in _FAST_DEFAULTS}
    if other := [f"{name}={value}" for name, value in given.items() if value != _FAST_DEFAULTS[name]]:
        raise UserError(
            f'engine="fast" does not take {", ".join(other)}: density alone sets its block, and sides="both", '
            'moments="dense" are all it supports; leave the others out, or give engine="exact"'
        )
    if unwrapped(model) is not model:
        raise UserError(
            f'engine="fast" puts new layers into the model, which {type(model).__name__} does not see: prepare the '
            "model first and wrap it afterwards"
        )


def _find_linears(model: nn.Module, names: Names | None, options: _Options) -> Linears:
    """Find the MLP linears and check that each can train, has enough entries and suits the engine."""
    linears = find_mlp(model, names)
    reshard(model)  # an evaluation before may have left whole weights behind
    if options.engine != "fast":
        refuse_shards(model)
    check_trainable(linears)
    refuse_released(linear.weight for linear in all_linears(linears))  # by the optimizer of an earlier call
    for name, linear in ((name, linear) for found in linears.values() for name, linear in found.items()):
        # For its check: keep must fit every weight.
        count_kept(linear.weight.shape, keep=options.keep, density=options.density, name=f"{name}.weight")
        if options.engine == "fast":
            check_linear(linear, 'engine="fast"', 'give engine="exact"')
            refuse_own_function(linear, name)
        if is_managed(linear) or is_shard(linear.weight):
            check_shards(linear)
    check_rotation_dtype(options.rotation_dtype, next(all_linears(linears)).weight.device)
    return linears


def _fit_bases(bases: Mapping[str, Basis], linears: Linears, sides: str) -> dict[str, Basis]:
    """Check that stored bases fit the model's weights, and return their `sides`."""
    if bases.keys() != linears.keys():
        raise UserError(
            f"bases are of the kinds {', '.join(bases) or 'none'}, the model's linears of {', '.join(linears)}: give "
            "the bases that were made with the same target_modules=, or calibrate again"
        )
    for kind, found in linears.items():
        for linear in found.values():
            if not bases[kind].fits(linear.weight.shape):
                raise UserError(
                    f"a basis for {bases[kind].shape} does not fit the weights {tuple(linear.weight.shape)} of kind "
                    f"{kind}: give the bases of this model, or calibrate again"
                )
    return {kind: bases[kind].only(sides) for kind in linears}


def _make_groups(
    model: nn.Module, linears: Linears, bases: Mapping[str, Basis], options: _Options
) -> list[dict[str, Any]]:
    """Set up the engine in the model, and return the optimizer's parameter groups."""
    if options.engine == "fast":
        assert options.density is not None
        return core_groups(model, use_blocks(model, linears, bases, options.density), options.decay_vectors)
    return param_groups(
        model,
        linears,
        bases,
        keep=options.keep,
        density=options.density,
        moments=options.moments,
        rotations=rotate_gradients(linears, bases, order=options.rotation_order, dtype=options.rotation_dtype),
        decay_vectors=options.decay_vectors,
    )


# The same function under the form of name that peft's LoRA variants have (`create_loraplus_optimizer`).
create_sparsegrad_optimizer = prepare
