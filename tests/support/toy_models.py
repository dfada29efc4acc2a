"""Tiny models in torch alone, one for each form of MLP that the library meets, and batches for them.

`bert` has two linears per block, `llama` three without bias, and `gpt2` has `Conv1D`s, whose weight is (in, out), and
an output layer that is tied to the embedding. Sizes and interface are those of `model_zoo`, which has the real
architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from toy_bert import BLOCKS, INNER, VOCABULARY, WIDTH, ToyBert

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "bert": {"intermediate": (INNER, WIDTH), "output": (WIDTH, INNER)},
    "llama": {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)},
    "gpt2": {"c_fc": (WIDTH, INNER), "c_proj": (INNER, WIDTH)},
}
"""Layout -> layer kind -> shape of the weight as it is stored."""


class Conv1D(nn.Module):
    """GPT-2's linear: y = x W + b with W (in, out); the library knows it by this name and `nf`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(0.02 * torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _LlamaMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Gpt2Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(INNER, WIDTH), Conv1D(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class _Block(nn.Module):
    """Causal attention with one head, then an MLP, each with a norm before and the input added."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp_norm, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), mlp
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        attention = nn.functional.scaled_dot_product_attention
        x = x + attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), is_causal=True)
        return x + self.mlp(self.mlp_norm(x))


class _Decoder(nn.Module):
    """Next-token prediction; `labels` are the tokens themselves, shifted inside as in transformers."""

    def run(self, ids: Tensor, embedding: nn.Embedding, blocks: nn.ModuleList, labels: Tensor | None) -> Any:
        x = embedding(ids)  # (batch, tokens, WIDTH)
        for block in blocks:
            x = block(x)
        logits = self.lm_head(x)  # (batch, tokens, VOCABULARY)
        if labels is None:
            return SimpleNamespace(loss=None, logits=logits)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class ToyLlama(_Decoder):
    """LLaMA's names: `model.layers.0.mlp.gate_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.model.layers = nn.ModuleList(_Block(_LlamaMlp()) for _ in range(BLOCKS))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.run(input_ids, self.model.embed_tokens, self.model.layers, labels)


class ToyGpt2(_Decoder):
    """GPT-2's names: `transformer.h.0.mlp.c_fc`; the embedding is the output layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer.h = nn.ModuleList(_Block(_Gpt2Mlp()) for _ in range(BLOCKS))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.run(input_ids, self.transformer.wte, self.transformer.h, labels)


TOYS: dict[str, Callable[[], nn.Module]] = {"bert": ToyBert, "llama": ToyLlama, "gpt2": ToyGpt2}


def toy_model(layout: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of `layout` with random weights of `seed`."""
    torch.manual_seed(seed)
    return TOYS[layout]().to(dtype)


def toy_batches(layout: str, count: int) -> list[dict[str, Tensor]]:
    """Batches with labels that the model of `layout` accepts: (4, 9) tokens."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        tokens = torch.randint(3, VOCABULARY, (4, 9), generator=generator)
        labels = torch.randint(2, (4,), generator=generator) if layout == "bert" else tokens
        batches.append({"input_ids": tokens, "labels": labels})
    return batches
