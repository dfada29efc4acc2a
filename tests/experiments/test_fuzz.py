"""A short run of `python -m experiments.reliability.fuzz`, and files that it found earlier: all are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.reliability.fuzz import mutate
from experiments.reliability.fuzz.__main__ import fuzz_all
from experiments.reliability.fuzz.base import Reader
from experiments.reliability.fuzz.readers import all_readers
from experiments.report.collect import collect_cells
from sparsegrad.adapter.format import FACTS, TENSORS
from sparsegrad.adapter.load import load_adapter
from sparsegrad.basis import Basis, load_bases, save_bases
from sparsegrad.errors import UserError, check_number, run_as_command
from sparsegrad.hashing import file_sha256
from sparsegrad.runs.records import find_complete, load_records
from sparsegrad.runs.yaml_check import check_folder, check_yaml
from sparsegrad.tasks import DataConfig, Oasst
from sparsegrad.trainer.checkpoints import is_whole, last_checkpoint, seal

INPUTS = 25  # of each reader
BOMB = "b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, object]]:
    return fuzz_all(INPUTS, seed=7)


def test_no_reader_has_a_defect(outcomes: dict[str, dict[str, object]]) -> None:
    assert set(outcomes) == set(all_readers())
    for name, found in outcomes.items():
        assert found["defects"] == [], name
        assert found["refused"] >= INPUTS / 4, f"{name} refuses too little: its damage does not reach it"


def test_an_input_follows_from_its_seed(tmp_path: Path) -> None:
    """So that a defect can be reproduced."""
    (tmp_path / mutate.OUTSIDE).mkdir()
    for change in (*mutate.ANY, *mutate.JSON):
        made = []
        for _ in range(2):
            path = tmp_path / "a.json"
            path.write_text(json.dumps({"a": [1, {"b": "c"}], "d": 0.5}))
            change(path, random.Random(3))
            with path.open("rb") as file:
                made.append((path.stat().st_size, file.read(10_000)))
        assert made[0] == made[1]


def test_the_guard_sees_what_a_reader_must_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that loads pickles, reads outside its folder, or fills the memory is a defect."""
    import pickle

    def careless(folder: Path) -> None:
        content = (folder / "f.json").read_bytes()
        if content.startswith(b"\x80"):
            pickle.loads(content)
        if b"secret" in content:
            (folder.parent / mutate.OUTSIDE / "secret").read_text()
        if b"DEEP" in content:
            bytearray(2**34)

    def make(folder: Path) -> None:
        (folder / "f.json").write_text('{"a": "b"}')

    def deep(path: Path, _: random.Random) -> None:
        path.write_text("DEEP")

    reader = Reader(make, {"f.json": (mutate.pickled, mutate.names_outside, deep)}, careless)
    monkeypatch.setattr("experiments.reliability.fuzz.__main__.all_readers", lambda: {"careless": reader})
    (found,) = fuzz_all(40, seed=0).values()
    said = " ".join(str(defect) for defect in found["defects"])
    for what in ("code of a file was run", "open ", "MemoryError"):
        assert what in said


def test_a_pickle_in_a_resealed_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (tmp_path / mutate.OUTSIDE).mkdir()
    for name in ("trainer_state.json", "optimizer.pt"):
        mutate.pickled(_text(checkpoint / name, "{}"), random.Random(0))
    seal(checkpoint, {})
    assert is_whole(checkpoint)
    assert last_checkpoint(tmp_path) is None
    assert not (tmp_path / mutate.OUTSIDE / mutate.PAYLOAD).exists()


def test_a_manifest_is_of_its_own_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    _text(checkpoint / "trainer_state.json", "{}")
    seal(checkpoint, {})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert is_whole(checkpoint)
    secret = _text(tmp_path / "secret", "{}")
    for name in ("../secret", str(secret)):
        wrong = {**manifest, "files": {**manifest["files"], name: manifest["files"]["trainer_state.json"]}}
        _text(checkpoint / "manifest.json", json.dumps(wrong))
        assert not is_whole(checkpoint)


def test_a_flipped_bit_in_a_stored_basis_is_found(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_bases(path, {"up": Basis(torch.eye(4), torch.eye(4))})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged .*calibrate again"):
        load_bases(path)


def test_a_small_adapter_cannot_ask_for_a_large_product(tmp_path: Path) -> None:
    """The core between two bases with 150,000 columns each would need 180 GB."""
    all_readers()["adapters"].make(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    for part, rows in (("out", 12), ("in", 8)):
        tensors[f"up.{part}_basis::basis"] = torch.zeros(rows, 150_000)
    save_file(tensors, tmp_path / TENSORS, {"format": "x"})
    facts = json.loads((tmp_path / FACTS).read_text())
    _text(tmp_path / FACTS, json.dumps({**facts, "sha256": file_sha256(tmp_path / TENSORS)}))
    model = torch.nn.Sequential(torch.nn.Linear(8, 12))
    with pytest.raises(UserError, match="basis of kind up does not fit"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, {", "parsing"),
        ("a: 1\na: 2", "repeated"),
        ("a: !!python/object/apply:os.mkdir [x]", "not plain data"),
        ("a: &x [*x]", "contains itself|recursive"),
        ("a: " + "[" * 60 + "]" * 60, "nested deeper"),
        ("a: " + "[" * 100_000, "nested deeper|parsing"),
        ("a: " + "9" * 5000, "digits"),
        ("- 1", "not a mapping"),
        ("? [a]\n: b", "not a text"),
        (BOMB, "aliases"),
        ("\x00", "character|unacceptable"),
    ],
)  # fmt: skip
def test_broken_yaml_is_one_line(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = _text(tmp_path / "x.yaml", text)
    with pytest.raises(UserError, match=message):
        check_yaml(path)
    assert run_as_command(lambda: check_folder(tmp_path)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_configuration_of_ours_passes() -> None:
    check_folder(Path(__file__).parents[2] / "conf")


def _line(**more: object) -> str:
    return json.dumps({"message_id": "a", "role": "prompter", "text": "t", "review_result": True, **more})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([_line(), _line(message_id="b", parent_id="c"), _line(message_id="c", parent_id="b")], "in a circle"),
        ([_line(message_id=str(i), parent_id=str(i - 1) if i else None) for i in range(300)], "more than 200"),
        ([_line(role=["prompter"])], "role of message"),
        ([_line(parent_id=["a"])], "is missing"),
        ([_line(text="\ud800")], "half a Unicode pair"),
        ([_line(message_id="\ud800")], "half a Unicode pair"),
        (['{"prompt": {"role": "prompter", "text": "t", "replies": 3}}'], "replies of message"),
        (['{"prompt": {"role": "prompter", "text": "t", "replies": ["x"]}}'], "is a str"),
        (["[" * 100_000], "no JSON"),
        (["9" * 5000], "no JSON"),
        (["x" * (2**24 + 1)], "longer than"),
    ],
)
def test_broken_conversations_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = _text(tmp_path / "t.jsonl", "\n".join(lines))
    with pytest.raises(UserError, match=message):
        Oasst(name="oasst1", eval_base=1).load(DataConfig(dir=str(path)))


def test_conversations_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl line 1: not UTF-8"):
        Oasst(name="oasst1", eval_base=1).load(DataConfig(dir=str(tmp_path)))


@pytest.mark.parametrize("change", [{"config": 3}, {"status": []}, {"trainable": {"total": "x"}}, {"result": {}}])
def test_a_record_of_other_types_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    all_readers()["records"].make(tmp_path)
    path = tmp_path / "record.json"
    _text(path, json.dumps({**json.loads(path.read_text()), **change}))
    for read in (lambda: find_complete(path), lambda: load_records(tmp_path)):
        with pytest.raises(UserError, match="not a readable record"):
            read()


def test_a_record_nested_deep_does_not_end_the_report(tmp_path: Path) -> None:
    _text(tmp_path / "a.json", "[" * 100_000)
    assert len(collect_cells(tmp_path).skipped) == 1


def test_a_record_of_a_planned_run_nested_deep_does_not_end_the_report(tmp_path: Path) -> None:
    all_readers()["records of a report"].make(tmp_path)
    assert not collect_cells(tmp_path).skipped
    path = tmp_path / "glue_bert_base" / "record.json"
    record = json.loads(path.read_text())
    record["config"]["model"]["deep"] = "DEEP"
    # JSON of this depth can be read; to copy it would recurse twice a level.
    _text(path, json.dumps(record).replace('"DEEP"', "[" * 480 + "]" * 480))
    assert "nested deeper than 32 levels" in collect_cells(tmp_path).skipped[0]


def test_numbers_beyond_every_float_are_out_of_bounds() -> None:
    for value in (10**400, float("inf"), float("nan")):
        with pytest.raises(UserError):
            check_number("x", value)


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
