"""One model, as its YAML in conf/model describes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsegrad.errors import UserError, check_choice, check_number, check_text, fail
from sparsegrad.models.layer_choice import check_blocks


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model, as its YAML in conf/model says.

    Attributes:
        name: its name in records and tables.
        source: hub id, local folder, or `asset:NAME`.
        revision: branch, tag or commit of a hub id; null: its default branch.
        keep_head: take over the head that a pretrained source has, rows ordered by label names; false: the head is new.
        pooling: what a classifier's head sees: `mean` over the tokens or `cls`, the first one; null: the model's own.
        trust_remote_code: whether code that a hub repository brings may run.
        weights: `pretrained`, or `random`: the architecture alone; the tokenizer is read as before.
        architecture: fields of the model's configuration, used with random weights.
        tokenizer: where the tokenizer comes from; null means from `source`.
        mlp: layer kind -> pattern of module names, or the name of a known layout (`sparsegrad.targets`).
        kinds: those of its layer kinds that are fine-tuned; null: all.
        dense: those of its layer kinds that train densely beside them, whatever the method; null: none.
        blocks: indices of the blocks whose MLP is fine-tuned, or a slice such as `0::3`; null: all.
        head: pattern of the parameters that are new for each task.
        lr: learning rate where none is given.
        lora_rank: the rank of method=lora, the paper's for this size.
        authors_keep: kept entries per weight of method=sparsegrad_authors, the authors' for this size.
        usual: what this model sets where conf/config.yaml and conf/method say `oc.select:model.usual...`.
    """

    name: str
    source: str
    mlp: Any
    head: str
    lr: float
    lora_rank: int
    authors_keep: int
    kinds: Any = None
    dense: Any = None
    blocks: Any = None
    usual: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "pretrained"
    tokenizer: str | None = None
    revision: str | None = None
    keep_head: bool = False
    pooling: str | None = None
    trust_remote_code: bool = False
    architecture: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.weights", self.weights, ("pretrained", "random"))
        for name in ("name", "source", "head"):
            check_text(f"model.{name}", getattr(self, name))
        for name in ("tokenizer", "revision"):
            if getattr(self, name) is not None:
                check_text(f"model.{name}", getattr(self, name))
        check_choice("model.pooling", self.pooling, (None, "mean", "cls"), none="null")
        for name in ("keep_head", "trust_remote_code"):
            check_choice(f"model.{name}", getattr(self, name), (True, False))
        check_number("model.lr", self.lr, above=0)
        check_blocks(self.blocks)
        if not isinstance(self.architecture, Mapping):
            raise fail("model.architecture", self.architecture, "give fields of the model's configuration")
        try:
            re.compile(self.head)
        except re.error as error:
            raise UserError(f"model.head={self.head} is not a regular expression: {error}") from None

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the head."""
        return re.fullmatch(self.head, name) is not None
