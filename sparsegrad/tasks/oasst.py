"""OpenAssistant conversations (OASST1) from the hub, or from files in its export formats (paper, section 5.2)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad.assets import hub_data as hub
from sparsegrad.errors import UserError, check_choice, fail
from sparsegrad.tasks.base import DataConfig, Splits, check_texts
from sparsegrad.tasks.dialogue import Turn
from sparsegrad.tasks.glue_files import lines
from sparsegrad.tasks.language import LanguageTask, in_tenth, make_conversations
from sparsegrad.tasks.trees import Tree, conversations, drop_unanswered, flat_trees, nested_tree

HUB_NAME = "OpenAssistant/oasst1"
# Conversations in the authors' run, all languages. The hub's splits have 84,437 and 4,401 messages, so 0.52 and 0.51
# conversations per message. In a sample of 100 English trees, all root-to-leaf paths are 0.54 per message, paths
# without unanswered questions 0.47, and paths that end with an answer 0.34. So the authors' counts most likely include
# conversations that end with the user's turn.
AUTHORS_COUNTS = {"train": 44042, "validation": 2241}


@dataclass(frozen=True, kw_only=True)
class Oasst(LanguageTask):
    """Every root-to-leaf path of every conversation tree.

    `data.dir` is a file of trees or messages (one JSON object per line), or a folder with train.jsonl and
    validation.jsonl, or with any *.jsonl, of which a fixed tenth of the trees is the validation split; None: the hub,
    with its own split.

    Attributes:
        langs: languages to keep, such as [en, de]; null keeps all.
        drop_last_question: leave out questions without an answer, which end about a third of the paths: the model then
            learns no end of text after a user's turn. False: keep them, as the authors' counts imply.
    """

    langs: Sequence[str] | None = None
    drop_last_question: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task.drop_last_question", self.drop_last_question, (True, False))
        if self.langs is not None:
            if not isinstance(self.langs, list | tuple) or not self.langs:
                raise fail("task.langs", self.langs, "give a list of languages such as [en,de], or null for all")
            check_texts("task.langs", self.langs)
            object.__setattr__(self, "langs", tuple(self.langs))

    def _read(self, data: DataConfig) -> Splits:
        train, validation = _read_hub() if data.dir is None else _read_folder(Path(data.dir).expanduser())
        _check_distinct(train, validation)
        counts: dict[str, Any] = {}
        parts = [self._make_rows(part, trees, counts) for part, trees in (("train", train), ("validation", validation))]
        return Splits(make_conversations(parts[0]), make_conversations(parts[1]), counts)

    def _make_rows(self, part: str, trees: list[Tree], counts: dict[str, Any]) -> list[tuple[str, list[Turn]]]:
        seen: Counter[str] = Counter()
        if self.drop_last_question:
            for tree in trees:
                drop_unanswered(tree.root)
        rows = list(conversations(trees, self.langs, seen))
        counts |= {f"{part}_{name}": count for name, count in sorted(seen.items())}
        counts[f"{part}_conversations_authors"] = AUTHORS_COUNTS[part]
        return rows


def _check_distinct(train: list[Tree], validation: list[Tree]) -> None:
    """Refuse a tree that occurs twice: in both splits it would be trained on and scored."""
    twice = [name for name, count in Counter(tree.id for tree in train + validation).items() if count > 1]
    if twice:
        raise UserError(f"conversation tree {twice[0]} occurs twice ({len(twice)} such): keep one copy of each")


def _read_folder(path: Path) -> tuple[list[Tree], list[Tree]]:
    named = [path / "train.jsonl", path / "validation.jsonl"]
    if all(file.is_file() for file in named):
        return _read_file(named[0]), _read_file(named[1])
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not files:
        raise UserError(
            f"data.dir={path}: no such file, and no folder with *.jsonl files of conversation trees: give one, or null "
            "for the hub, or use task=alpaca data.dir=null, which needs no hub"
        )
    trees = [tree for file in files for tree in _read_file(file)]
    train = [tree for tree in trees if not in_tenth(tree.id, "validation")]
    return train, [tree for tree in trees if in_tenth(tree.id, "validation")]


def _read_file(path: Path) -> list[Tree]:
    rows = list(_parse_lines(path))
    if any("prompt" in row for _, row in rows):  # whole trees; otherwise single messages
        return [nested_tree(row, f"{path} line {number}") for number, row in rows]
    return flat_trees((row for _, row in rows), str(path))


def _parse_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is no JSON ({error}): correct or remove it") from None
            if not isinstance(row, Mapping):
                raise UserError(f"{path} line {number}: give one JSON object, a tree or a message")
            yield number, row


def _read_hub() -> tuple[list[Tree], list[Tree]]:
    parts = ("train", "validation")
    otherwise = "set data.dir=<exported trees>, or use task=alpaca, which needs no hub"
    found = hub.read_dataset(HUB_NAME, {part: f"data/{part}-*.parquet" for part in parts}, otherwise)
    train, validation = (flat_trees(found[part], f"{HUB_NAME} {part}") for part in parts)
    return train, validation
