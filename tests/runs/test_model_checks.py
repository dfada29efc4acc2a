"""Facts of model and tokenizer that do not go together are refused before training, and every remedy works."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_python import quick_python
from run_fixtures import Composer, environment, last_wins
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sparsegrad.errors import UserError
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.model_checks import count_positions
from sparsegrad.runs.runner import run

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TOKENS = 39  # of the tests' tokenizer
LONG = "a long film " * 30
Made = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of a tokenizer with 39 tokens."""
    folder = tmp_path_factory.mktemp("words")
    with tarfile.open(Path(__file__).parent / "data" / "before-layout.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "tokenizer" / "tokenizer.json"


@pytest.fixture
def tokenizer(words: Path) -> Callable[..., Any]:
    """`tokenizer(pad_token=...)`: one with these special tokens alone."""

    def make(**special: str) -> Any:
        return PreTrainedTokenizerFast(tokenizer_file=str(words), **special)

    return make


@pytest.fixture
def made(conf: Composer, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """`made(*overrides)`: a short run from the folder `source`, on short texts; this folder becomes the current one."""
    monkeypatch.chdir(tmp_path)
    kept = [one for one in small if not one.startswith(("model.", "+model."))]

    def configuration(*overrides: str) -> RunConfig:
        given = (f"model.source={tmp_path / 'source'}", "model.lora_rank=2", "method=lora", *overrides)
        return build(conf(*last_wins(*kept, *given)))

    return configuration


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bert(rows: int = TOKENS, positions: int = 64) -> Any:
    return BertForSequenceClassification(BertConfig(vocab_size=rows, max_position_embeddings=positions, **SIZES))


def llama(rows: int = TOKENS, **fields: Any) -> Any:
    fields = {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 64, **fields}
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, num_key_value_heads=1, **SIZES, **fields))


AS_LLAMA = ("model.mlp=llama", r"model.head='score\..*'")


def carry_out(remedy: str) -> str:
    """Run the command `python -c "..."` of a remedy, as a shell does, in this folder; the setting to use then."""
    found = re.search(r'(python -c ".*?"), then set (model\.\w+=\S+)', remedy)
    assert found, remedy
    words = shlex.split(found[1])
    subprocess.run([quick_python(), *words[1:]], env=environment(), check=True, capture_output=True)
    return found[2]


def refusal(config: RunConfig, *words: str) -> str:
    """The error of a run, in one line and with all `words`; no record is left."""
    with pytest.raises(UserError) as caught:
        run(config)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not config.record_path.exists()
    return str(caught.value)


def completes(config: RunConfig) -> dict[str, Any]:
    record, _ = run(config)
    assert record["status"] == "complete"
    return record


def test_a_decoder_without_a_padding_token_pads_with_its_end_of_text(
    made: Made, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "source", llama(), tokenizer(eos_token="[SEP]", unk_token="[UNK]"))
    caplog.set_level(logging.INFO)
    completes(made(*AS_LLAMA, "save_model=true"))
    assert "no padding token: its end-of-text token [SEP] pads" in caplog.text
    saved = next(path.parent for path in tmp_path.rglob("models/*/*/config.json"))
    fields = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert fields["pad_token_id"] == tokenizer().convert_tokens_to_ids("[SEP]")


def test_padding_changes_no_score_of_a_decoder(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    """Padded to 12 or to the longest of a batch, the decision is read at the text's last token."""
    save(tmp_path / "source", llama(), tokenizer(eos_token="[SEP]", unk_token="[UNK]"))
    scores = [
        completes(made(*AS_LLAMA, "data.max_length=12", f"data.pad={pad}"))["evaluations"][-1]["loss"]
        for pad in ("longest", "max_length")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_without_padding_and_end_of_text_the_remedy_gives_one(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    save(tmp_path / "source", bert(), tokenizer(unk_token="[UNK]"))
    said = refusal(made(), "no padding token", "model.tokenizer=./tokenizer")
    completes(made(carry_out(said)))


def test_without_any_special_token_another_tokenizer_is_named(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    save(tmp_path / "source", bert(), tokenizer())
    refusal(made(), "no padding token", "with model.tokenizer=")
    tokenizer(pad_token="[PAD]").save_pretrained(tmp_path / "other")
    completes(made(f"model.tokenizer={tmp_path / 'other'}"))


def test_a_configuration_without_a_padding_id_gets_the_tokenizers(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    save(tmp_path / "source", llama(pad_token_id=None), tokenizer(pad_token="[PAD]", unk_token="[UNK]"))
    completes(made(*AS_LLAMA, "method=sparsegrad"))  # calibration comes before the Trainer, which would set it too


def test_positions_counted_from_another_padding_token_are_refused(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    model = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=TOKENS, max_position_embeddings=66, pad_token_id=1, **SIZES)
    )
    own = tokenizer(pad_token=tokenizer().convert_ids_to_tokens(1), unk_token="[UNK]")
    save(tmp_path / "source", model, own)
    tokenizer(pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path / "other")
    refusal(made(f"model.tokenizer={tmp_path / 'other'}"), "padding id 1", "model.tokenizer=null")
    completes(made("model.tokenizer=null"))  # the remedy


@pytest.mark.parametrize(("kind", "positions"), [("bert", 16), ("roberta", 14), ("llama", 16)])
def test_rows_longer_than_the_models_positions_are_refused(
    kind: str, positions: int, made: Made, tokenizer: Any, tmp_path: Path
) -> None:
    """Of RoBERTa's 16 rows of positions, two are before the first token."""
    extra: tuple[str, ...] = AS_LLAMA if kind == "llama" else ()
    if kind == "roberta":
        config = RobertaConfig(vocab_size=TOKENS, max_position_embeddings=16, pad_token_id=1, **SIZES)
        model: Any = RobertaForSequenceClassification(config)
    else:
        model = bert(positions=16) if kind == "bert" else llama(max_position_embeddings=16)
    save(tmp_path / "source", model, tokenizer(pad_token=tokenizer().convert_ids_to_tokens(int(kind == "roberta")),
                                              unk_token="[UNK]"))  # fmt: skip
    assert count_positions(model) == positions
    folder = tmp_path / "long" / "sst2"
    folder.mkdir(parents=True)
    for part in ("train", "validation"):
        rows = [json.dumps({"sentence": LONG, "label": i % 2}) + "\n" for i in range(12)]
        (folder / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
    given = (*extra, f"data.dir={folder.parent}")
    said = refusal(made(*given, "data.max_length=20"), f"{positions} positions", "longest row 20")
    remedy = re.search(r"use (data\.max_length=\d+)", said)
    assert remedy
    completes(made(*given, remedy[1]))


def test_short_texts_are_not_refused_for_a_long_limit(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    save(tmp_path / "source", bert(positions=32), tokenizer(pad_token="[PAD]"))
    completes(made("data.max_length=128"))


def test_a_tokenizer_larger_than_the_embedding_is_refused(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    save(tmp_path / "source", bert(rows=30), tokenizer(pad_token="[PAD]"))
    said = refusal(made(), "up to id 38", "30 rows", "model.source=./resized")
    completes(made(carry_out(said)))


def test_a_language_models_embedding_is_resized_by_the_remedy(
    made: Made, tokenizer: Any, tmp_path: Path, places: tuple[str, str]
) -> None:
    save(tmp_path / "source", llama(rows=30), tokenizer(pad_token="[PAD]", unk_token="[UNK]"))
    given = (*AS_LLAMA, "task=alpaca", f"data.dir={_instructions(tmp_path)}", "data.max_length=16",
             "train.warmup_steps=1")  # fmt: skip
    said = refusal(made(*given), "up to id 38", "30 rows", "AutoModelForCausalLM")
    completes(made(*given, carry_out(said)))


def test_another_larger_tokenizer_is_refused(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    larger = tokenizer(pad_token="[PAD]")
    larger.add_tokens(["splendid"])
    larger.save_pretrained(tmp_path / "larger")
    save(tmp_path / "source", bert(), tokenizer(pad_token="[PAD]"))
    refusal(made(f"model.tokenizer={tmp_path / 'larger'}"), "up to id 39", "39 rows", "model.tokenizer=null")
    completes(made("model.tokenizer=null"))


def _instructions(tmp_path: Path) -> Path:
    rows = [{"instruction": f"add {i} and two", "output": f"it is {i + 2}"} for i in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_a_slow_tokenizer_does_not_go_with_a_masked_prompt(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    save(tmp_path / "source", llama(rows=400), ByT5Tokenizer())
    given = (*AS_LLAMA, "task=alpaca", f"data.dir={_instructions(tmp_path)}", "data.max_length=16",
             "train.warmup_steps=1")  # fmt: skip
    refusal(made(*given, "task.mask_prompt=true"), "task.mask_prompt=", "task.mask_prompt=false", "model.tokenizer=")
    completes(made(*given, "task.mask_prompt=false"))
    tokenizer(pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path / "fast")
    completes(made(*given, "task.mask_prompt=true", f"model.tokenizer={tmp_path / 'fast'}"))


@pytest.mark.parametrize(
    ("wrong", "says", "right"),
    [
        ("+model.kinds=[intermediate,true]", "in quotes", "+model.kinds=[intermediate,output]"),
        ("+model.kinds=[1]", "in quotes", "+model.kinds=[intermediate]"),
        ("+model.kinds=5", "give a list", "+model.kinds=null"),
        ("+model.dense=[null]", "in quotes", "+model.dense=null"),
        ("+model.blocks=[true]", "whole number", "+model.blocks=[0,1]"),
    ],
)
def test_elements_of_the_models_lists_have_their_type(
    wrong: str, says: str, right: str, made: Made, tokenizer: Any, tmp_path: Path
) -> None:
    save(tmp_path / "source", bert(), tokenizer(pad_token="[PAD]"))
    refusal(made(wrong), f"{wrong[1:].split('=')[0]}=", says)
    completes(made(right))


class Payload:
    """Creates a folder where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["archive", "plain"])
def test_weights_that_would_run_code_are_refused_in_one_line(
    form: str, made: Made, tokenizer: Any, tmp_path: Path, run_py: Any, glue: Path
) -> None:
    save(tmp_path / "source", bert(), tokenizer(pad_token="[PAD]"))
    (tmp_path / "source" / "model.safetensors").unlink()
    weights, proof = tmp_path / "source" / "pytorch_model.bin", tmp_path / "code-was-run"
    if form == "archive":
        torch.save({"a": Payload(proof)}, weights)
    else:
        weights.write_bytes(pickle.dumps(Payload(proof)))
    refusal(made(), "would run code", str(tmp_path / "source"))
    if form == "archive":
        done = run_py(
            f"model.source={tmp_path / 'source'}", "task=sst2", f"data.dir={glue}", "train.device=cpu", "method=full"
        )
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert "Traceback" not in done.stderr
    assert not proof.exists()
