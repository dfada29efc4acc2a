"""What an adapter stores in how many bytes, beside a LoRA adapter with as many trainable numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsegrad.adapter.format import Entry
from sparsegrad.optim.summary import describe


@dataclass(frozen=True)
class Saved:
    """What `save_adapter` wrote, in bytes; `print(saved)` shows it on one line.

    Attributes:
        folder: folder of the adapter.
        forms: number of tensors of each form.
        mlp_bytes: size of the SparseGrad weights, including their bases if they are rotated.
        rest_bytes: size of all other changed tensors, which peft's adapters would store as `modules_to_save`.
        lora_bytes: size of LoRA matrices on the same weights with as many trainable numbers; None without `optimizer`.
    """

    folder: Path
    forms: dict[str, int]
    mlp_bytes: int
    rest_bytes: int
    lora_bytes: int | None

    def __str__(self) -> str:
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.items() if count)
        lora = "" if self.lora_bytes is None else f" (LoRA of the same count: {_format_bytes(self.lora_bytes)})"
        sizes = f"target weights {_format_bytes(self.mlp_bytes)}{lora}, the rest {_format_bytes(self.rest_bytes)}"
        return f"{sizes}; tensors: {forms}"


def summarize(
    folder: Path, entries: Mapping[str, Entry], bases: Mapping[str, Tensor], mlp: Mapping[str, str], optimizer: Any
) -> Saved:
    """Sum up what is stored.

    Args:
        folder: folder of the adapter.
        entries: tensor name -> entry.
        bases: stored columns of bases.
        mlp: parameter name -> layer kind of the SparseGrad weights.
        optimizer: what `prepare` returned, or None.
    """
    forms = dict(Counter(entry.form for entry in entries.values()))
    of_mlp = sum(entry.size for name, entry in entries.items() if name in mlp)
    rest = sum(entry.size for name, entry in entries.items() if name not in mlp)
    basis = sum(tensor.nbytes for tensor in bases.values())
    return Saved(folder, forms, of_mlp + basis, rest, None if optimizer is None else _count_lora_bytes(optimizer))


def _count_lora_bytes(optimizer: Any) -> int:
    """Size of LoRA in float32, peft's default, with the rank whose count is closest to the kept entries."""
    # Rank r of a weight (out, in) trains r * (out + in) numbers of 4 bytes.
    return sum(
        4 * len(group.names) * sum(group.shape) * max(1, round(group.kept / sum(group.shape)))
        for group in describe(optimizer).taken
    )


def _format_bytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
