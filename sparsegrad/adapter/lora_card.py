"""What `save_lora` wrote, and the model card that states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsegrad.adapter.card import LORA_MARK, describe_base, write_unless_edited

_CARD = """---
library_name: peft
{base_model}tags: [lora, sparsegrad]
---

# LoRA adapter for {title}

The change of a fine-tuned `{model}` as an ordinary LoRA adapter, with scaling 1, extracted by
[SparseGrad](https://arxiv.org/abs/2410.07383)'s `save_lora`.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, ".")  # model: the base, a {model}
```

Content: {content}.

{served}

The relative error of a weight is the Frobenius norm of what its LoRA matrices miss, divided by that of its change.

| weight | rank | relative error |
|---|---|---|
{rows}

Data, training settings, results and limitations: to be added by whoever trained it.
"""


@dataclass(frozen=True)
class SavedLora:
    """What `save_lora` wrote; `print(saved)` shows it on one line.

    Attributes:
        folder: folder of the adapter.
        ranks: name of each linear with LoRA matrices -> their rank.
        errors: the same names -> relative error |change - B A| / |change| (Frobenius norm).
        whole: names of the modules that are stored whole (`modules_to_save`).
        bias: whether the LoRA matrices have a bias (`lora_bias`).
        lora_bytes: size of the LoRA matrices and their biases.
        whole_bytes: size of the modules that are stored whole.
    """

    folder: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    whole: tuple[str, ...]
    bias: bool
    lora_bytes: int
    whole_bytes: int

    @property
    def obstacles(self) -> tuple[str, ...]:
        """What vLLM or llama.cpp do not read; empty if both can serve the adapter. `peft` reads all of it."""
        found = ["modules_to_save"] if self.whole else []
        found += ["lora_bias"] if self.bias else []
        # vLLM reads one rank, and llama.cpp scales each product by alpha / its own rank.
        return (*found, "rank_pattern") if len(set(self.ranks.values())) > 1 else tuple(found)

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {high}" if low == high else f"ranks {low} to {high}"
        bias = " with bias" if self.bias else ""
        text = (
            f"LoRA{bias} on {len(self.ranks)} linears, {rank}, largest relative error {max(self.errors.values()):.2g}"
        )
        whole = f"; {len(self.whole)} modules whole, {self.whole_bytes / 1e6:.2f} MB" if self.whole else ""
        return f"{text}, {self.lora_bytes / 1e6:.2f} MB{whole}"


def write_lora_card(saved: SavedLora, source: str | None, model: str) -> None:
    """Write README.md, unless there is one that was written or edited by hand; in that case log a warning.

    Args:
        saved: what was written.
        source: name of the base; None if it is unknown.
        model: class name of the model.

    Raises:
        UserError: when the file cannot be read or written.
    """
    served = "It contains LoRA matrices of one rank alone, as vLLM and the converter of llama.cpp expect."
    if saved.obstacles:
        served = (
            f"It uses {', '.join(saved.obstacles)}: peft loads it, but vLLM and llama.cpp do not support all of it."
        )
    rows = "\n".join(f"| `{name}` | {rank} | {saved.errors[name]:.2g} |" for name, rank in saved.ranks.items())
    text = _CARD.format(**describe_base(source, model), model=model, content=saved, served=served, rows=rows)
    write_unless_edited(saved.folder / "README.md", text, LORA_MARK)
