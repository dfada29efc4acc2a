"""Estimate the memory that fine-tuning needs, before anything is computed.

Weights, gradients, optimizer state and bases are exact to a few percent. Activations are an estimate: per token and
block 14 vectors as wide as the model and 5 as wide as the MLP, and per token of a language model 3 rows of logits in
float32. Every row counts as `data.max_length` tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from sparsegrad.errors import UserError
from sparsegrad.models.layer_choice import find_linears, select_linears
from sparsegrad.models.outline import load_outline
from sparsegrad.runs.config import RunConfig
from sparsegrad.targets import Linears, weight_shapes

log = logging.getLogger(__name__)
GIB = 2**30
_WIDE, _MLP, _LOGITS = 14, 5, 3
_ADAM = 8  # bytes of both moments of one entry
_RANK = 32  # of the LoRA that is suggested
_PROCESS = GIB  # Python, torch and its libraries on a CPU; the context and cached blocks on a GPU
# The paper's Table 6: share of the parameters that each method trains.
PUBLISHED_SHARE = {"full": "22 %", "lora": "0.5 %", "meprop": "0.5 %", "sparsegrad": "0.5 %"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that the estimate depends on.

    Attributes:
        method: name of the method.
        parameters: number of the model's parameters.
        selected: entries of the weights that are fine-tuned.
        shapes: layer kind -> (out, in).
        linears: number of fine-tuned weights.
        width, mlp_width, depth: sizes of the model.
        vocabulary: scores per token; 0 for a classifier, which has one row of them per sequence.
        tokens: tokens of a micro-batch.
        precision, checkpointing: as in `train`.
        added: parameters that train in place of the MLP weights, which are frozen; None: these train.
        rest: parameters that train besides.
        collects: whether the calibration holds the gradients of all MLP weights at once, and their mean.
        bases: whether the method calibrates bases.
    """

    method: str
    parameters: int
    selected: int
    shapes: dict[str, tuple[int, int]]
    linears: int
    width: int
    mlp_width: int
    depth: int
    vocabulary: int
    tokens: int
    precision: str
    checkpointing: bool
    added: int | None = None
    rest: int = 0
    collects: bool = False
    bases: bool = False


def estimate_memory(setup: Setup) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state, calibration (bases and collected gradients) and activations."""
    frozen_size = 2 if setup.precision == "bf16_weights" else 4
    trained = setup.selected if setup.added is None else setup.added
    # Bases are calibrated with MLP weights that train, which are float32 from then on: those of engine fast, too.
    stays_small = setup.added is not None and not setup.bases
    in_float32 = setup.rest + (0 if stays_small else setup.selected)
    weights = (setup.parameters - in_float32) * frozen_size + in_float32 * 4
    weights += 4 * (setup.added or 0)
    gradients, optimizer = 4 * (trained + setup.rest), _ADAM * (trained + setup.rest)
    # Collected gradients are gone before the training needs its own and the moments.
    collected = max(0, 2 * 4 * setup.selected - gradients - optimizer) if setup.collects else 0
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "bases": _bases(setup) + collected,
        "activations": _activations(setup),
    }


def _bases(setup: Setup) -> int:
    """U and V of each kind, and as much again for the Grams that they are computed from."""
    if not setup.bases:
        return 0
    return sum(2 * 4 * (rows**2 + columns**2) for rows, columns in setup.shapes.values())


def _activations(setup: Setup) -> int:
    size = 4 if setup.precision == "fp32" else 2
    block = (_WIDE * setup.width + _MLP * setup.mlp_width) * size
    blocks = block + setup.depth * setup.width * size if setup.checkpointing else setup.depth * block
    return setup.tokens * (blocks + _LOGITS * 4 * setup.vocabulary)


def check_memory(config: RunConfig, model: nn.Module, linears: Linears, device: torch.device) -> None:
    """Log the estimate beside the memory of `device`.

    Raises:
        UserError: when it does not fit; the message names settings that would.
    """
    setup, available = make_setup(config, model, linears), memory_of(device)
    need = estimate_memory(setup)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in need.items())
    log.info("estimated memory in GiB: %s; total %.2f of %.1f", parts, sum(need.values()) / GIB, available / GIB)
    share = 100 * setup.selected / setup.parameters
    published = PUBLISHED_SHARE.get(setup.method, "none")
    log.info("selected weights are %.1f %% of the model; the paper says of %s: %s", share, setup.method, published)
    check_fits(setup, available)


def check_fits(setup: Setup, available: int) -> None:
    """Raise `UserError` when the estimate exceeds `available` bytes, and name settings that fit."""
    need = sum(estimate_memory(setup).values())
    if need <= available:
        return
    fits = [text for text, other in _smaller(setup) if sum(estimate_memory(other).values()) <= available]
    remedy = (
        f"this would fit: {'; or '.join(fits[:3])}" if fits else "no setting of this model fits: use a smaller model"
    )
    raise UserError(
        f"{setup.method} needs about {need / GIB:.1f} GiB and the device has {available / GIB:.1f}: {remedy}"
    )


def _smaller(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Cheaper setups with the overrides that give them; those that change the result least come first."""
    checkpointed = replace(setup, checkpointing=True)
    yield "train.gradient_checkpointing=true", checkpointed
    light = replace(checkpointed, precision="bf16_weights")
    yield "train.gradient_checkpointing=true train.precision=bf16_weights", light
    one = replace(light, tokens=max(1, setup.tokens // 4))
    yield "the same with a quarter of train.batch_size (and more train.grad_accumulation)", one
    adapters = _RANK * sum(map(sum, setup.shapes.values())) * (setup.linears // len(setup.shapes))
    yield "the same with method=lora", replace(one, method="lora", added=adapters, collects=False, bases=False)


def make_setup(config: RunConfig, model: nn.Module, linears: Linears) -> Setup:
    """The setup of one run."""
    whole: Any = model.config
    architecture, method = whole.get_text_config(), config.method  # for text, of a model that reads images, too
    found = [linear for kind in linears.values() for linear in kind.values()]
    shapes, width = weight_shapes(linears), architecture.hidden_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    selected = sum(linear.weight.numel() for linear in found)
    return Setup(
        method=method.name,
        parameters=parameters,
        selected=selected,
        shapes=shapes,
        linears=len(found),
        width=width,
        mlp_width=max(_mlp_width(shape, width) for shape in shapes.values()),
        depth=architecture.num_hidden_layers,
        vocabulary=architecture.vocab_size if config.task.is_language else 0,
        tokens=config.train.batch_size * config.data.max_length,
        precision=config.train.precision,
        checkpointing=config.train.gradient_checkpointing,
        added=method.count_added(linears) if hasattr(method, "count_added") else None,
        rest=parameters - selected if config.train.train_rest and not getattr(method, "chooses_rest", False) else 0,
        collects=getattr(method, "collects_gradients", False),
        bases=getattr(method, "has_bases", False),
    )


def estimate_run(config: RunConfig) -> int:
    """Bytes that a run needs on its device, from the outline of its model; nothing is loaded.

    An upper bound for most runs: every batch counts as full of rows of `data.max_length` tokens, and methods without
    `count_added` count as training every MLP weight with dense moments.

    Raises:
        UserError: if the model does not exist or has no such MLP weights.
    """
    model = load_outline(config.model, config.task)
    found = find_linears(model, config.model.mlp)
    setup = make_setup(config, model, select_linears(found, config.model.kinds, config.model.blocks))
    return sum(estimate_memory(setup).values()) + _PROCESS


def _mlp_width(shape: tuple[int, int], width: int) -> int:
    """The side of a weight that is not the model's width; not every configuration names it (GPT-2)."""
    return next((side for side in shape if side != width), width)


def memory_of(device: torch.device) -> int:
    """Total memory of the device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
