"""OpenAssistant trees: which conversations come out, how they are written and packed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_fixtures import LLAMA, message, tree, write_trees
from run_fixtures import Composer, last_wins

from sparsegrad.assets.download import asset_path
from sparsegrad.errors import UserError
from sparsegrad.runs.config import build
from sparsegrad.runs.keys import determining
from sparsegrad.tasks import DataConfig, Oasst
from sparsegrad.tasks.dialogue import Turn, write_chat, write_inst
from sparsegrad.tasks.language import IGNORED, Packer, make_conversations


def oasst(**fields: Any) -> Oasst:
    return Oasst(name="oasst1", eval_base=4, **fields)


def read(path: Path, **fields: Any) -> Any:
    return oasst(**fields).load(DataConfig(dir=str(path)))


def turns(splits: Any) -> list[list[str]]:
    rows = [*splits.train["conversation"], *splits.validation["conversation"]]
    return [[turn["text"] for turn in json.loads(row)] for row in rows]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(asset_path("minilm"))


def test_every_path_from_root_to_leaf_comes_out_once(tmp_path: Path) -> None:
    found = read(write_trees(tmp_path / "trees.jsonl", [tree(i) for i in range(40)]))
    expected = [[f"what is two and two {i}", "it is four", "are you sure"] for i in range(40)]
    expected += [[f"what is two and two {i}", "four"] for i in range(40)]
    assert sorted(turns(found)) == sorted(expected)
    assert found.counts["train_conversations"] + found.counts["validation_conversations"] == 80
    assert found.counts["train_conversations_authors"] == 44042


def test_a_tree_is_never_on_both_sides(tmp_path: Path) -> None:
    found = read(write_trees(tmp_path / "trees.jsonl", [tree(i) for i in range(40)]))
    assert not set(found.train["group"]) & set(found.validation["group"])
    train, held = oasst().heldout(found.train)
    assert not set(train["group"]) & set(held["group"])
    assert len(train) + len(held) == len(found.train)


def test_single_messages_in_any_order_give_the_same_trees(tmp_path: Path) -> None:
    nested, flat = [tree(i) for i in range(30)], []

    def flatten(row: dict[str, Any], tree_id: str) -> None:
        flat.append({**{k: v for k, v in row.items() if k != "replies"}, "message_tree_id": tree_id})
        for reply in row["replies"]:
            flatten(reply, tree_id)

    for one in nested:
        flatten(one["prompt"], one["message_tree_id"])
    whole = read(write_trees(tmp_path / "a.jsonl", nested))
    rebuilt = read(write_trees(tmp_path / "b.jsonl", flat[::-1]))
    assert sorted(turns(whole)) == sorted(turns(rebuilt))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"deleted": True}, "deleted"), ({"review_result": False}, "spam"), ({"review_result": None}, "unreviewed")],
)
def test_a_dropped_message_takes_its_replies_along(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    bad = message("x", "assistant", "buy this", message("y", "prompter", "why"), **fields)
    root = message("r", "prompter", "hello", bad)
    write_trees(tmp_path / "train.jsonl", [{"message_tree_id": "t", "prompt": root}])
    write_trees(tmp_path / "validation.jsonl", [tree(1)])
    found = read(tmp_path)
    assert [json.loads(row) for row in found.train["conversation"]] == [[{"role": "user", "text": "hello"}]]
    assert found.counts[f"train_messages_{reason}"] == 1


def test_languages_and_unfinished_trees_are_left_out_and_counted(tmp_path: Path) -> None:
    given = [tree(1), tree(2, lang="de"), {**tree(3), "tree_state": "aborted_low_grade"}]
    write_trees(tmp_path / "train.jsonl", given)
    write_trees(tmp_path / "validation.jsonl", [tree(9)])
    counts = read(tmp_path, langs=["en"]).counts
    assert (counts["train_conversations"], counts["train_trees"]) == (2, 3)
    assert (counts["train_trees_in_other_languages"], counts["train_trees_unfinished"]) == (1, 1)


@pytest.mark.parametrize(
    ("root", "says"),
    [
        (
            message("r", "prompter", "hello", message("x", "assistant", "hi", parent_id="gone")),
            "answers gone, which is",
        ),
        (message("r", "moderator", "hello"), "role of message r=moderator is not allowed: choose one of prompter"),
        (message("r", "prompter", "  "), "message r has no text"),
    ],
)
def test_a_bad_message_is_named_with_its_line(tmp_path: Path, root: dict[str, Any], says: str) -> None:
    path = write_trees(tmp_path / "trees.jsonl", [tree(1), {"message_tree_id": "t", "prompt": root}])
    with pytest.raises(UserError, match=says) as error:
        read(path)
    assert "line 2" in str(error.value)


def test_a_missing_parent_among_single_messages_is_named(tmp_path: Path) -> None:
    rows = [message("r", "prompter", "hello"), message("x", "assistant", "hi", parent_id="gone")]
    with pytest.raises(UserError, match="message x answers gone, which is missing"):
        read(write_trees(tmp_path / "flat.jsonl", rows))


def test_two_messages_of_one_id_are_refused(tmp_path: Path) -> None:
    rows = [message("r", "prompter", "hello"), message("r", "prompter", "hello again")]
    with pytest.raises(UserError, match="message r occurs twice"):
        read(write_trees(tmp_path / "flat.jsonl", rows))


def test_a_tree_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="t1 occurs twice"):
        read(write_trees(tmp_path / "trees.jsonl", [tree(1), tree(1)]))


def test_nothing_left_says_what_was_left_out(tmp_path: Path) -> None:
    path = write_trees(tmp_path / "trees.jsonl", [tree(i) for i in range(30)])
    with pytest.raises(UserError, match=r"no conversation is left for the train split.*trees in other languages"):
        read(path, langs=["fr"])


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "trees.jsonl").write_text(text)
    with pytest.raises(UserError, match="line 1"):
        read(tmp_path)


def test_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none")


def test_inst_is_the_papers_format() -> None:
    conversation = [Turn("user", "a"), Turn("assistant", "b c"), Turn("user", "d")]
    text, answers = write_inst(conversation)
    assert text == "[INST] a [/INST] b c [INST] d [/INST]"
    assert [text[start:end] for start, end in answers] == [" b c"]


class Templated:
    chat_template = "given"

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool = False) -> str:
        return "".join(f"<{m['role']}>{m['content']};" for m in messages) + "<assistant>" * add_generation_prompt


def test_chat_is_the_tokenizers_template() -> None:
    text, answers = write_chat([Turn("user", "a"), Turn("assistant", "b")], Templated())
    assert text == "<user>a;<assistant>b;"
    assert [text[start:end] for start, end in answers] == ["b;"]


def test_chat_without_a_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"task\.format=chat is not allowed"):
        write_chat([Turn("user", "a")], tokenizer)


def test_packing_loses_no_token_and_counts_what_it_splits() -> None:
    packer, given = Packer(4, padding=0), [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    for ids in given:
        packer.add(ids, ids)
    windows = packer.finish()
    kept = [i for ids, mask in zip(windows["input_ids"], windows["attention_mask"], strict=True)
            for i, on in zip(ids, mask, strict=True) if on]  # fmt: skip
    assert kept == list(range(1, 11))
    assert packer.counts == {
        "conversations": 3, "tokens": 10, "loss_tokens": 7, "windows": 3, "longer_than_window": 1,
        "split_between_windows": 1,
    }  # fmt: skip
    assert [row[0] for row in windows["labels"]] == [IGNORED] * 3


def test_mask_prompt_leaves_the_loss_on_answers(tokenizer: Any) -> None:
    rows = make_conversations([("t", [Turn("user", "two and two"), Turn("assistant", "four"), Turn("user", "thanks")])])
    windows, counts = oasst(mask_prompt=True).tokens(rows, tokenizer, DataConfig(max_length=32))
    learned = [label for label in windows["labels"][0] if label != IGNORED]
    assert tokenizer.decode(learned) == "four"
    _, everything = oasst().tokens(rows, tokenizer, DataConfig(max_length=32))
    assert counts["tokens"] == everything["tokens"]
    assert everything["loss_tokens"] == everything["tokens"] - 1


def test_no_answer_to_learn_is_refused(tokenizer: Any) -> None:
    rows = make_conversations([("t", [Turn("user", "two and two")])])
    with pytest.raises(UserError, match="no token has a loss"):
        oasst(mask_prompt=True).tokens(rows, tokenizer, DataConfig(max_length=8))


@pytest.mark.parametrize("fields", [{"format": "alpaca"}, {"langs": "en"}, {"mask_prompt": 3}, {"main_metric": "f1"}])
def test_bad_settings_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"task\.{next(iter(fields))}"):
        oasst(**fields)


def test_conversations_that_end_with_a_question_are_counted(tmp_path: Path) -> None:
    write_trees(tmp_path / "train.jsonl", [tree(i) for i in range(3)])
    write_trees(tmp_path / "validation.jsonl", [tree(9)])
    counts = read(tmp_path).counts
    assert (counts["train_conversations"], counts["train_conversations_ending_with_question"]) == (6, 3)
    assert counts["validation_conversations_ending_with_question"] == 1


def test_questions_without_an_answer_can_be_left_out(tmp_path: Path, tokenizer: Any) -> None:
    alone = {"message_tree_id": "alone", "prompt": message("r", "prompter", "nobody answers")}
    write_trees(tmp_path / "train.jsonl", [tree(1), alone])
    write_trees(tmp_path / "validation.jsonl", [tree(9)])
    found = read(tmp_path, drop_last_question=True)
    kept = [[turn["role"] for turn in json.loads(row)] for row in found.train["conversation"]]
    assert kept == [["user", "assistant"], ["user", "assistant"]]
    assert found.counts["train_messages_unanswered"] == 2
    assert found.counts["train_conversations_ending_with_question"] == 0
    windows, counts = oasst().tokens(found.train, tokenizer, DataConfig(max_length=64))
    assert counts["conversations"] == 2
    assert tokenizer.decode(windows["input_ids"][0], skip_special_tokens=True).count("[ / inst ]") == 2


def test_a_question_with_an_answer_stays_when_its_other_answers_are_dropped(tmp_path: Path) -> None:
    spam = message("s", "assistant", "buy this", message("t", "prompter", "no"), review_result=False)
    root = message("r", "prompter", "hello", spam, message("u", "assistant", "hi"))
    write_trees(tmp_path / "train.jsonl", [{"message_tree_id": "t", "prompt": root}])
    write_trees(tmp_path / "validation.jsonl", [tree(9)])
    found = read(tmp_path, drop_last_question=True)
    assert [[turn["text"] for turn in json.loads(row)] for row in found.train["conversation"]] == [["hello", "hi"]]


def test_the_default_keeps_key_and_conversations_of_earlier_records(conf: Composer) -> None:
    """The switch came after the first records: its default must leave their keys as they are."""
    given = last_wins(*LLAMA)
    before, off, on = (
        build(conf(*given, *more)) for more in ((), ["task.drop_last_question=false"], ["task.drop_last_question=true"])
    )
    assert before.key == off.key
    assert before.key != on.key
    assert "drop_last_question" not in determining(before.resolved)["task"]
