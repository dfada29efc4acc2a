"""Language tasks: conversations packed into windows of one length, scored by the loss per token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import datasets
import numpy as np

from sparsegrad.errors import UserError, check_choice
from sparsegrad.hashing import text_sha256
from sparsegrad.progress import job
from sparsegrad.tasks.base import DataConfig, Splits, Task, check_tokenizer_fits
from sparsegrad.tasks.dialogue import Turn, write_chat, write_inst
from sparsegrad.tasks.subsets import subset

FORMATS = ("inst", "chat")
IGNORED = -100  # label of a token without loss: the default ignore_index of torch's cross entropy
_HELDOUT_SHARE = 10  # one group in ten
_BATCH = 1000  # conversations tokenized at once


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """Conversations for a causal language model; a subclass defines where they come from.

    A row has `conversation`, its turns as JSON, and `group`: rows of one group are never separated by a split.

    Attributes:
        format: `inst`, the paper's `[INST] ... [/INST] ...`, or `chat`, the tokenizer's own chat template.
        mask_prompt: loss on the assistant's turns only; false: on all tokens, as in the authors' code.
        usual: this task's defaults for the values that conf/config.yaml reads by `oc.select:task.usual...`.
    """

    columns: tuple[str, ...] = ("conversation",)
    main_metric: str = "nll"
    format: str = "inst"
    mask_prompt: bool = False
    usual: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task.format", self.format, FORMATS)
        check_choice("task.mask_prompt", self.mask_prompt, (True, False))
        check_choice("task.main_metric", self.main_metric, ("nll", "perplexity"))

    @property
    def is_language(self) -> bool:
        """Always true."""
        return True

    @property
    def greater_is_better(self) -> bool:
        """Always false: loss and perplexity are better lower."""
        return False

    @property
    def token_facts(self) -> dict[str, Any]:
        """Format and mask: both change the tokens."""
        return {"format": self.format, "mask_prompt": self.mask_prompt}

    def load(self, data: DataConfig) -> Splits:
        """Read both splits and keep `data.max_train` and `data.max_eval` conversations.

        Raises:
            UserError: if the data cannot be read, or no conversation is left in a split.
        """
        found = self._read(data)
        for part, rows in (("train", found.train), ("validation", found.validation)):
            if not len(rows):
                counts = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in found.counts.items())
                raise UserError(
                    f"task={self.name}: no conversation is left for the {part} split{data.place} "
                    f"({counts or 'no counts'}); "
                    "give more data, or remove a filter such as task.langs"
                )
        train, validation = subset(found.train, data.max_train), subset(found.validation, data.max_eval)
        return replace(found, train=train, validation=validation)

    def heldout(self, train: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Hold out a tenth of the groups, each as a whole; see `in_tenth`."""
        held = np.array([in_tenth(group) for group in train["group"]])
        if held.all() or not held.any():
            groups = len(set(train["group"]))
            raise UserError(
                f"{groups} groups of conversations are too few to hold out a tenth: give more data, raise "
                "data.max_train, or use protocol=paper"
            )
        return train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held))

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return a collator that only stacks: all windows have one length."""
        from transformers import default_data_collator

        return default_data_collator  # type: ignore[no-any-return]

    def tokens(
        self, rows: datasets.Dataset, tokenizer: Any, data: DataConfig
    ) -> tuple[datasets.Dataset, dict[str, int]]:
        """Pack conversations, in order and without gaps, into windows of `data.max_length` tokens.

        Nothing is truncated: a conversation that does not fit continues in the next window. The last window is padded.

        Raises:
            UserError: if no token has a loss, or `data.max_length` is more than the tokenizer allows.
        """
        check_tokenizer_fits(tokenizer, data)
        # LLaMA's tokenizer has no padding token. Padding is masked, so any id will do.
        padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        packer = Packer(data.max_length, int(padding))
        turns = ([Turn(**turn) for turn in json.loads(text)] for text in rows["conversation"])
        with job("tokenizing", len(rows), unit="conversations") as bar:
            while batch := list(islice(turns, _BATCH)):
                for ids, labels in self._encode(batch, tokenizer):
                    packer.add(ids, labels)
                bar.step(len(batch))
        windows = packer.finish()
        if not packer.counts["loss_tokens"]:
            raise UserError(
                f"task={self.name}: no token has a loss: task.mask_prompt=true needs conversations with answers; "
                "give some, or set it to false"
            )
        return windows, packer.counts

    def _encode(self, batch: list[list[Turn]], tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (token ids, labels) of each conversation; a label is the token's id, or IGNORED."""
        written = [(write_inst if self.format == "inst" else write_chat)(turns, tokenizer) for turns in batch]
        texts = [text for text, _ in written]
        found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=self.mask_prompt)
        for row, (_, answers) in enumerate(written):
            ids = list(found["input_ids"][row])
            labels = list(ids)
            if self.mask_prompt:
                # A token belongs to the turn in which its first character is.
                firsts = [first for first, _ in found["offset_mapping"][row]]
                learned = [any(start <= first < end for start, end in answers) for first in firsts]
                labels = [i if keep else IGNORED for i, keep in zip(ids, learned, strict=True)]
            yield self._add_ends(ids, labels, tokenizer)

    def _add_ends(self, ids: list[int], labels: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
        """Add the tokens that begin and end a text; a chat template writes its own."""
        if self.format == "inst":
            if tokenizer.bos_token_id is not None:
                ids, labels = [tokenizer.bos_token_id, *ids], [IGNORED, *labels]
            if tokenizer.eos_token_id is not None:
                # An answer's end is learned like the answer, or the model would never stop.
                learned = labels[-1] != IGNORED
                ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id if learned else IGNORED]
        return ids, labels


class Packer:
    """Fills windows of `length` tokens with one text after the other, and counts conversations, tokens and windows."""

    def __init__(self, length: int, padding: int) -> None:
        self.length, self.padding = length, padding
        self._ids: list[int] = []
        self._labels: list[int] = []
        names = ("conversations", "tokens", "loss_tokens", "windows", "longer_than_window", "split_between_windows")
        self.counts = dict.fromkeys(names, 0)

    def add(self, ids: list[int], labels: list[int]) -> None:
        """Append one text."""
        before = len(self._ids)
        self._ids += ids
        self._labels += labels
        self.counts["conversations"] += 1
        self.counts["tokens"] += len(ids)
        self.counts["longer_than_window"] += len(ids) > self.length
        self.counts["split_between_windows"] += before // self.length != (len(self._ids) - 1) // self.length

    def finish(self) -> datasets.Dataset:
        """Return the windows: input_ids, attention_mask and labels, (length,) each.

        The first token of a window has no label: nothing before it predicts it, and it must not count among the tokens
        by which the loss of a batch is divided.
        """
        missing = -len(self._ids) % self.length  # tokens that fill the last window
        ids = np.array(self._ids + [self.padding] * missing).reshape(-1, self.length)  # (windows, length)
        labels = np.array(self._labels + [IGNORED] * missing).reshape(-1, self.length)
        mask = np.ones_like(ids)
        if missing:
            mask[-1, -missing:] = 0
        labels[:, 0] = IGNORED
        self.counts |= {"windows": len(ids), "loss_tokens": int((labels != IGNORED).sum())}
        columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return datasets.Dataset.from_dict({name: values.tolist() for name, values in columns.items()})


def make_conversations(rows: list[tuple[str, list[Turn]]]) -> datasets.Dataset:
    """Make the rows of a language task from pairs (group, turns)."""
    texts = [json.dumps([{"role": turn.role, "text": turn.text} for turn in turns]) for _, turns in rows]
    kinds = dict.fromkeys(("conversation", "group"), datasets.Value("string"))
    columns = {"conversation": texts, "group": [group for group, _ in rows]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def in_tenth(group: str, salt: str = "heldout") -> bool:
    """Whether a group belongs to a fixed tenth, the same on every machine; each `salt` selects another tenth."""
    return int(text_sha256(f"{salt} {group}"), 16) % _HELDOUT_SHARE == 0
