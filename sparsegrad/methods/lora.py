"""LoRA on the MLP linears, by `peft` (paper, section 4; rank and scale as in the authors' code)."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from sparsegrad.errors import check_choice, check_integer, check_number
from sparsegrad.layers.replace import replace_module
from sparsegrad.methods.base import (
    Context,
    Prepared,
    adamw,
    freeze,
    set_trainable,
    trainable_parameters,
    widen_linear,
)
from sparsegrad.targets import Linears, weight_shapes


@dataclass(frozen=True, kw_only=True)
class Lora:
    """W + (alpha / rank) B A with B (out, rank) and A (rank, in); W is frozen, its bias is not.

    Attributes:
        rank: of B A; at least 1, at most the smaller side of every weight.
        alpha: numerator of the scale; alpha = 1 is the paper's scale 1 / rank. None: 2 * rank, common practice today.
        dropout: on the input of A; 0 <= dropout < 1.
        authors_init: draw A as the authors' code does. It stores A as (in, rank) and takes the second axis for the
            inputs, so that A's standard deviation is 1 / sqrt(3 rank) instead of 1 / sqrt(3 in): 10 times as large for
            768 inputs and rank 7, 21 times for 3,072.
    """

    rank: int
    alpha: int | None = 1
    dropout: float = 0.0
    authors_init: bool = False
    name: str = "lora"

    def __post_init__(self) -> None:
        check_integer("method.rank", self.rank, at_least=1, remedy="the paper uses 7 (base) and 10 (large)")
        if self.alpha is not None:
            check_integer("method.alpha", self.alpha, at_least=1, remedy="the paper uses 1; null is 2 * rank")
        check_number("method.dropout", self.dropout, at_least=0, below=1)
        check_choice("method.authors_init", self.authors_init, (True, False))

    def check(self, linears: Linears) -> None:
        """Raise `UserError` if the rank exceeds the smaller side of a weight."""
        smaller = min(min(shape) for shape in weight_shapes(linears).values())
        check_integer("method.rank", self.rank, at_least=1, at_most=smaller, remedy="no weight has a larger rank")

    def count_added(self, linears: Linears) -> int:
        """See `Method`."""
        shapes = weight_shapes(linears)
        return sum(self.rank * sum(shapes[kind]) * len(found) for kind, found in linears.items())

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        names = [name for found in linears.values() for name in found]
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        config = LoraConfig(r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=names)
        inject_adapter_in_model(config, model)
        # peft has frozen everything but the adapters; the paper trains everything outside the MLP weights.
        freeze(model, linears, context, mlp_weights=False)
        for name, parameter in model.named_parameters():
            if self.authors_init and ".lora_A." in name:
                nn.init.uniform_(parameter, -(self.rank**-0.5), self.rank**-0.5)  # kaiming_uniform_ with fan_in = rank
            if ".lora_" in name:  # the adapters too: `freeze` treats them like any other parameter
                set_trainable(parameter, True)
        parameters = trainable_parameters(model)
        return Prepared(
            optimizer=adamw(parameters, context),
            trainable=sum(parameter.numel() for parameter in parameters),
            trainable_per_weight={kind: self.rank * sum(shape) for kind, shape in weight_shapes(linears).items()},
            finish=lambda: _merge_adapters(model, names),
        )


def _merge_adapters(model: nn.Module, names: list[str]) -> None:
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        widen_linear(layer.get_base_layer())
        layer.merge()
        replace_module(model, name, layer.get_base_layer())
