"""Models with real architectures and random weights: known transformers, and stacks of their MLPs alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError, check_choice, check_integer
from sparsegrad.targets import Linears, find_mlp

_LLAMA_MLP = {"up": r".*layers\.\d+\.mlp\.up_proj", "down": r".*layers\.\d+\.mlp\.down_proj"}
_STACK_MLP = {"intermediate": r"blocks\.\d+\.intermediate", "output": r"blocks\.\d+\.output"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One architecture.

    Attributes:
        about: description for tables.
        hidden, intermediate: width of the model and of its MLPs.
        blocks: number of blocks of the whole model; for a stack of MLPs, the default number.
        words: size of the vocabulary; 0: a stack of MLPs, whose input is vectors instead of tokens.
        fields: further fields of the `transformers` configuration.
        mlp: layer kind -> pattern of module names, or the name of a known layout.
        head: pattern of the names of parameters that train in every setting.
    """

    about: str
    hidden: int
    intermediate: int
    blocks: int
    words: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    mlp: Mapping[str, str] | str = "bert"
    head: str = r"classifier\..*"

    @property
    def is_stack(self) -> bool:
        """Whether this is a stack of MLPs alone."""
        return self.words == 0

    def cut(self, blocks: int | None) -> tuple[int, int]:
        """(blocks, words) of the model cut to `blocks`; the vocabulary keeps its share of the parameters.

        Raises:
            UserError: for more blocks than the model has.
        """
        most = 64 if self.is_stack else self.blocks
        taken = check_integer("blocks", self.blocks if blocks is None else blocks, at_least=1, at_most=most)
        return taken, self.words if self.is_stack else max(8, self.words * taken // self.blocks)

    def label(self, blocks: int | None) -> str:
        """Description of the model as it is measured, with what was cut."""
        taken, words = self.cut(blocks)
        if self.is_stack:
            return f"{self.about}; {taken} blocks"
        if taken == self.blocks:
            return f"{self.about}; all {taken} blocks"
        return f"{self.about}; scaled: {taken} of {self.blocks} blocks, {words:,} of {self.words:,} words"

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the head."""
        return re.fullmatch(self.head, name) is not None


def _bert(about: str, hidden: int, blocks: int, heads: int, words: int = 30522, **fields: Any) -> Shape:
    fields = {"model_type": "bert", "num_attention_heads": heads, **fields}
    return Shape(about=about, hidden=hidden, intermediate=4 * hidden, blocks=blocks, words=words, fields=fields)


def _roberta(about: str, hidden: int, blocks: int, heads: int) -> Shape:
    # RoBERTa's positions start at 2, hence 514 for 512 tokens.
    fields = {"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return _bert(about, hidden, blocks, heads, 50265, **fields)


def _llama(about: str, hidden: int, intermediate: int, heads: int) -> Shape:
    fields = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": heads, "pad_token_id": 1}
    sizes = {"hidden": hidden, "intermediate": intermediate, "blocks": 32, "words": 32000}
    return Shape(about=about, **sizes, fields=fields, mlp=_LLAMA_MLP, head=r"score\..*")


def _stack(hidden: int, blocks: int = 2) -> Shape:
    about = f"MLPs alone, {hidden}/{4 * hidden}"
    return Shape(about=about, hidden=hidden, intermediate=4 * hidden, blocks=blocks, mlp=_STACK_MLP)


SHAPES: dict[str, Shape] = {
    "bert_base": _bert("BERT-base", 768, 12, 12),
    "roberta_base": _roberta("RoBERTa-base", 768, 12, 12),
    "roberta_large": _roberta("RoBERTa-large", 1024, 24, 16),
    "minilm": _bert("MiniLM-L6", 384, 6, 12),
    "llama_2_7b": _llama("LLaMA-2-7B", 4096, 11008, 32),
    "llama_quarter": _llama("LLaMA-2-7B at a quarter of its width", 1024, 2752, 8),
    **{f"mlp_{hidden}": _stack(hidden) for hidden in (384, 768, 1024, 2048, 4096)},
    "tiny": _bert("tiny BERT, for tests", 32, 2, 2, 50),
    "mlp_tiny": _stack(32),
}


def find_shape(name: str) -> Shape:
    """The shape with this name; raises `UserError` with the known names otherwise."""
    return SHAPES[check_choice("shape", name, tuple(SHAPES))]


def build_model(shape: Shape, blocks: int | None, dtype: torch.dtype) -> nn.Module:
    """The model with random weights in train mode, with its architecture's dropout.

    Raises:
        UserError: when transformers is not installed and the shape needs it.
    """
    if shape.is_stack:
        return MlpStack(shape.hidden, shape.intermediate, shape.cut(blocks)[0]).to(dtype)
    try:
        from transformers import AutoConfig, AutoModelForSequenceClassification
    except ImportError:
        raise UserError(f"{shape.about} needs the package transformers: install it, or choose mlp_*") from None
    taken, words = shape.cut(blocks)
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": taken}
    config = AutoConfig.for_model(**shape.fields, **sizes, vocab_size=words, num_labels=2)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    return model.train()


def mlp_linears(shape: Shape, model: nn.Module) -> Linears:
    """The MLP linears that the methods train, by layer kind."""
    return find_mlp(model, shape.mlp)


class MlpStack(nn.Module):
    """Blocks x + W_out gelu(W_in norm(x)) and a classifier of the mean: almost nothing but MLP linears.

    The input requires a gradient, as the input of every block inside a model does; otherwise the first block would
    skip its input gradient.
    """

    def __init__(self, hidden: int, intermediate: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_MlpBlock(hidden, intermediate) for _ in range(blocks))
        self.classifier = nn.Linear(hidden, 2)

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        """inputs (rows, tokens, hidden) and labels (rows,) to an object with `loss`, like a model of `transformers`."""
        x = inputs.detach().requires_grad_(True)
        for block in self.blocks:
            x = block(x)
        return _Output(nn.functional.cross_entropy(self.classifier(x.mean(1)).float(), labels))


class _MlpBlock(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.intermediate = nn.Linear(hidden, intermediate)
        self.output = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.output(nn.functional.gelu(self.intermediate(self.norm(x))))  # type: ignore[no-any-return]


@dataclass
class _Output:
    loss: Tensor
