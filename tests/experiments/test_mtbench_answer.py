"""Answers of a tiny random Llama: batches, resuming, schema, custom questions."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.mtbench import answer as answering
from experiments.mtbench.cli import main
from experiments.mtbench.generation import Writer, write_prompt
from experiments.mtbench.lines import append_line, only_writer, read_lines
from experiments.mtbench.schema import (
    TEMPERATURES,
    Question,
    load_answers,
)
from sparsegrad.errors import BUSY, UserError
from sparsegrad.models.source import find_source

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["alpha beta", "gamma"]},
    {"question_id": 2, "category": "math", "turns": ["beta", "alpha gamma beta"]},
    {"question_id": 3, "category": "stem", "turns": ["gamma gamma", "alpha"]},
    {"question_id": 4, "category": "writing", "turns": ["beta beta beta alpha", "beta"]},
    {"question_id": 5, "category": "writing", "turns": ["alpha"]},
    {"question_id": "own", "category": "unheard of", "turns": ["alpha", "beta"]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two blocks and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "alpha", "beta", "gamma", "[", "INST", "]", "/", *(f"w{i}" for i in range(22))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, **sizes, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


Answering = Callable[..., int]


@pytest.fixture
def run(model: Path, questions: Path, tmp_path: Path) -> Answering:
    """Run the answer command on a CPU; returns its exit status."""

    def ran(*more: str, out: str = "out") -> int:
        fixed = ("answer", "--model", str(model), "--questions", str(questions), "--device", "cpu")
        sizes = ("--max-new-tokens", "6", "--batch-size", "2", "--out", str(tmp_path / out))
        return main([*fixed, *sizes, "--name", "tiny", *more])

    return ran


def said(tmp_path: Path, out: str = "out") -> dict[Any, tuple[str, ...]]:
    """Question -> turns of the answers file."""
    return {one.question_id: one.turns for one in load_answers(tmp_path / out / "model_answer" / "tiny.jsonl")}


def load_writer(model: Path, count: int) -> Writer:
    return Writer.load(find_source(str(model)), format="inst", max_new_tokens=count, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_without_a_head_for_language_is_refused(model: Path, tmp_path: Path, is_tied: bool) -> None:
    """Its head would be random; one that is tied to the embeddings is none that is missing."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    shutil.copytree(model, tmp_path / "copy")
    kind: Any = LlamaForCausalLM if is_tied else LlamaForSequenceClassification
    kind.from_pretrained(model, tie_word_embeddings=is_tied).save_pretrained(tmp_path / "copy")
    if is_tied:
        assert load_writer(tmp_path / "copy", 2)
    else:
        with pytest.raises(UserError, match=r"lacks lm_head\.weight, which would be random: give a causal"):
            load_writer(tmp_path / "copy", 2)


def test_every_question_is_answered_in_fastchats_schema(run: Answering, tmp_path: Path) -> None:
    assert run() == 0
    rows = read_lines(tmp_path / "out" / "model_answer" / "tiny.jsonl")
    assert {row["question_id"]: len(row["choices"][0]["turns"]) for row in rows} == {
        1: 2, 2: 2, 3: 2, 4: 2, 5: 1, "own": 2,
    }  # fmt: skip
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (row["model_id"], row["choices"][0]["index"], len(row["answer_id"])) == ("tiny", 0, 22)
        assert all(text for text in row["choices"][0]["turns"])


def test_a_seed_gives_the_same_answers_and_another_one_others(run: Answering, tmp_path: Path) -> None:
    run()
    run(out="again")
    run("--seed", "7", out="other")
    assert said(tmp_path) == said(tmp_path, "again")
    other = said(tmp_path, "other")
    assert other[1] != said(tmp_path)[1]  # drawn at temperature 0.7
    assert other[2] == said(tmp_path)[2]  # greedy


def test_a_stopped_run_ends_with_the_answers_of_a_whole_one(run: Answering, tmp_path: Path) -> None:
    run()
    path = tmp_path / "out" / "model_answer" / "tiny.jsonl"
    whole, lines = said(tmp_path), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:25])  # killed while it wrote the fourth
    kept = read_lines(path)
    assert len(kept) == 3
    assert run() == 0
    assert said(tmp_path) == whole
    assert read_lines(path)[:3] == kept
    assert len(read_lines(path)) == len(QUESTIONS)


def test_two_processes_do_not_answer_into_one_file(
    run: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_writer(tmp_path / "out" / "model_answer" / "tiny.jsonl"):
        assert run() == BUSY
    assert "another process is already writing it" in capsys.readouterr().err
    assert run() == 0


def test_a_finished_run_loads_no_model(run: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setattr(Writer, "load", lambda *_, **__: pytest.fail("loaded"))
    assert run() == 0


def test_answers_made_otherwise_are_not_mixed(run: Answering, capsys: pytest.CaptureFixture[str]) -> None:
    run("--ids", "1", "5")
    capsys.readouterr()
    assert run("--ids", "1", "5", "--seed", "7") == 2
    assert "started with seed=42, not 7: choose another --name" in capsys.readouterr().err


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the model's answers."""
    monkeypatch.setattr(Writer, "write", lambda self, conversations, *_: ["said"] * len(conversations))


@pytest.mark.usefixtures("cheap")
def test_answers_of_another_model_in_the_same_folder_are_not_mixed(
    run: Answering, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    assert run("--model", str(copy), "--ids", "1") == 0
    assert run("--model", str(copy), "--ids", "1", "--dtype", "float32") == 0, "what auto is on a CPU"
    assert run("--model", str(copy), "--ids", "1", "--dtype", "bfloat16") == 2
    assert "dtype=float32, not bfloat16: choose another --name" in capsys.readouterr().err
    assert run("--ids", "1") == 0, "the same model in another folder"
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert run("--model", str(copy), "--ids", "1") == 2
    assert re.search(r"source=files:\w+, not files:\w+: choose another --name", capsys.readouterr().err)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_answers_of_an_earlier_version_continue_when_the_missing_settings_are_added(
    run: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    run("--ids", "1")
    beside = tmp_path / "out" / "model_answer" / "tiny.settings.json"
    now = json.loads(beside.read_text())
    old = {key: value for key, value in {**now, "dtype": dtype}.items() if key != "source"}
    beside.write_text(json.dumps(old))
    assert run("--ids", "1") == 2
    error = capsys.readouterr().err
    assert "choose another --name" in error
    added = json.loads("{" + error.rpartition("settings.json: ")[2] + "}")
    assert set(added) == {"source", "dtype"} - ({"dtype"} if dtype == "float32" else set())
    beside.write_text(json.dumps({**old, **added}))
    assert run("--ids", "1") == 0


def test_temperatures_are_mt_benchs(monkeypatch: pytest.MonkeyPatch, run: Answering) -> None:
    asked: list[tuple[float, int]] = []

    def write(self: Writer, conversations: list[list[str]], temperature: float, seed: int) -> list[str]:
        asked.append((temperature, len(conversations)))
        return ["said"] * len(conversations)

    monkeypatch.setattr(Writer, "write", write)
    run()
    # math; stem; four at 0.7, of which one has a single turn
    assert asked == [(0.0, 1), (0.0, 1), (0.1, 1), (0.1, 1), (0.7, 2), (0.7, 2), (0.7, 2), (0.7, 1)]
    assert {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
        ("extraction", "math", "coding", "reasoning"), 0.0
    ) == TEMPERATURES


def test_the_second_turn_sees_the_first_answer(model: Path) -> None:
    seen: list[list[list[str]]] = []

    class Echo(Writer):
        def write(self, conversations: Any, temperature: float, seed: int) -> list[str]:
            seen.append([list(one) for one in conversations])
            return [f"answer to {one[-1]}" for one in conversations]

    echo = Echo.__new__(Echo)
    found = answering._answer_batch([Question(1, "math", ("a", "b"))], echo, "m", 1)
    assert seen == [[["a"]], [["a", "answer to a", "b"]]]
    assert found[0].turns == ("answer to a", "answer to b")


def test_padding_changes_no_greedy_answer(model: Path) -> None:
    writer = load_writer(model, 5)
    conversations = [["alpha"], ["beta gamma alpha beta gamma"], ["gamma gamma"]]
    alone = [writer.write([one], 0.0, 0)[0] for one in conversations]
    assert writer.write(conversations, 0.0, 0) == alone


def test_the_papers_format_and_the_chat_template(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = ["one", "two", "three"]
    assert write_prompt(turns, tokenizer, "inst") == "[INST] one [/INST] two [INST] three [/INST]"
    assert write_prompt(turns, tokenizer, "auto") == write_prompt(turns, tokenizer, "inst")
    with pytest.raises(UserError, match="no chat template; use --format inst"):
        write_prompt(turns, tokenizer, "chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    expected = "<user>one<assistant>two<user>three<assistant>"
    assert write_prompt(turns, tokenizer, "auto") == write_prompt(turns, tokenizer, "chat") == expected


def test_a_conversation_beyond_the_window_is_named(model: Path) -> None:
    writer = load_writer(model, 50)
    assert writer.write([["alpha " * 120]], 0.0, 0)  # a little room is left
    with pytest.raises(UserError, match=r"fills the model's window of 128: lower --max-new-tokens"):
        writer.write([["alpha " * 128]], 0.0, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question_id": 1, "category": "a"}', "question 2: turns must be a list of texts"),
        ('{"question_id": 1, "category": "a", "turns": []}', "one or two texts"),
        ('{"question_id": 1, "category": "a", "turns": ["x", " "]}', "not empty"),
        ('{"question_id": 1, "category": "a", "turns": ["x", "y", "z"]}', "one or two texts"),
        ('{"question_id": true, "category": "a", "turns": ["x"]}', "question_id=True is not allowed"),
        ('{"question_id": 1, "turns": ["x"]}', "question 2: category"),
        ('{"question_id": 1, "category": "a", "turns": ["x"], "reference": ["r", "s"]}', "2 texts for 1 turns"),
        ('{"question_id": 9, "category": "a", "turns": ["x"]}', "question_id 9 occurs twice"),
        ("[1]\n", "line 2 is not a JSON object"),
    ],
)
def test_a_bad_question_file_is_named(
    tmp_path: Path, row: str, message: str, run: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question_id": 9, "category": "a", "turns": ["x"]}\n' + row)
    assert run("--questions", str(path)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--questions", "nowhere.jsonl"), "questions file nowhere.jsonl does not exist"),
        (("--model", "./nowhere"), "./nowhere does not exist"),
        (("--name", "../up"), "name=../up is not allowed"),
        (("--ids", "77"), "no question has the id 77"),
        (("--format", "xml"), "choose one of auto, chat, inst"),
        (("--dtype", "int8"), "choose one of auto, float32"),
        (("--batch-size", "0"), "batch_size=0 is not allowed"),
        (("--max-new-tokens", "0"), "max_new_tokens=0 is not allowed"),
    ],
)
def test_bad_options_leave_nothing(
    tmp_path: Path, more: tuple[str, ...], message: str, run: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_append_mends_a_cut_line_and_keeps_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2')
    append_line(path, {"n": 3})
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n'
    path.write_text('{"n": 4}')  # whole, but its line is not ended
    append_line(path, {"n": 5})
    assert [row["n"] for row in read_lines(path)] == [4, 5]
