"""A BERT classifier in torch alone, with the module names of transformers' BERT. See `toy_models` for its batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, INNER, VOCABULARY, BLOCKS = 16, 32, 50, 2


class _Output(nn.Module):
    """A linear called `dense`, with a LayerNorm over its result and the block's input."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class _Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(x))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.output = _Output(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        # One head, no padding: (batch, tokens, WIDTH) throughout.
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.output(mixed, x)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = _Attention(), _Intermediate(), _Output(INNER)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.output(self.intermediate(x), x)


class _Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]


class ToyBert(nn.Module):
    """`model(input_ids=, labels=)` gives an object with `loss` and `logits`, as transformers' classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = nn.Module()
        self.bert.embeddings, self.bert.encoder = _Embeddings(), nn.Module()
        self.bert.encoder.layer = nn.ModuleList(_Block() for _ in range(BLOCKS))
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.bert.embeddings(input_ids)
        for block in self.bert.encoder.layer:
            x = block(x)
        logits = self.classifier(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def toy_bert(seed: int = 0) -> ToyBert:
    """A model of `seed`, in float32."""
    torch.manual_seed(seed)
    return ToyBert()
