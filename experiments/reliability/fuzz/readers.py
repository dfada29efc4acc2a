"""The readers of files that users bring or that a killed process may damage: how to make, damage and read them."""

from __future__ import annotations

import copy
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from experiments.paths import ROOT
from experiments.reliability.fuzz import mutate
from experiments.reliability.fuzz.base import LINES, TENSOR_FILE, TEXT, Reader
from experiments.reliability.fuzz.checkpoints import CHECKPOINTS
from experiments.reliability.fuzz.results import RESULTS
from sparsegrad.adapter.format import FACTS, TENSORS, Entry, digest, write_adapter
from sparsegrad.adapter.load import load_adapter
from sparsegrad.adapter.merge import named_tensors
from sparsegrad.basis import Basis, save_bases
from sparsegrad.errors import UserError
from sparsegrad.files import write_json
from sparsegrad.hashing import file_sha256
from sparsegrad.runs.basis_cache import BasisStore
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.config import build
from sparsegrad.runs.yaml_check import check_yaml
from sparsegrad.tasks import DataConfig, Glue, Instructions, Oasst, Snippets, Task


def _make_bases(folder: Path) -> None:
    bases = {"up": Basis(torch.eye(8), torch.eye(12)), "down": Basis(torch.eye(12), None)}
    save_bases(folder / "bases.safetensors", bases, "made of this")
    write_json(folder / "bases.json", {"seconds": 1.0, "memory": {"resident_mib": 3.0}})


def _read_bases(folder: Path) -> None:
    store = BasisStore(folder=folder, model=nn.Linear(1, 1), facts={}, own=folder / "bases.safetensors", resuming=True)
    bases, _ = store.calibrated(None, dict)
    for basis in bases.values():
        basis.fits((12, 8))


@cache
def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2))


def _make_adapter(folder: Path) -> None:
    base = named_tensors(_model())
    new = {name: tensor.detach() + 1 for name, tensor in base.items()}
    index = torch.tensor([1, 5, 9], dtype=torch.int32)

    def entry(name: str, form: str, values: torch.Tensor, at: torch.Tensor | None, kind: str | None = None) -> Entry:
        return Entry(form, tuple(base[name].shape), base[name].dtype, digest(base[name]), values.clone(), at, kind)

    entries = {
        "0.weight": entry("0.weight", "rotated", torch.ones(3), index.clone(), "up"),
        "1.weight": entry("1.weight", "sparse", new["1.weight"].flatten()[index.long()], index),
        "2.bias": entry("2.bias", "whole", new["2.bias"], None),
    }
    bases = {"up.out_basis": torch.eye(12)[:, :4], "up.in_basis": torch.eye(8)[:, :4]}
    write_adapter(folder, {"base": "none", "model": "Sequential", "tolerance": 0.1, "mlp": {}}, entries, bases)


def _repair_adapter(folder: Path, draw: random.Random) -> None:
    """In 80 % of inputs, write the right sha256 of the damaged tensors: otherwise the hash check refuses them all."""
    if draw.random() < 0.8 and (folder / TENSORS).stat().st_size < mutate.HUGE:
        facts = (folder / FACTS).read_bytes()
        try:
            write_json(folder / FACTS, {**json.loads(facts), "sha256": file_sha256(folder / TENSORS)})
        except (ValueError, TypeError, RecursionError):
            (folder / FACTS).write_bytes(facts)  # this is the damaged file: leave it as it was


def _read_adapter(folder: Path) -> None:
    model = copy.deepcopy(_model())
    adapter = load_adapter(model, folder)
    adapter.merge()
    adapter.unmerge()
    if any(not torch.equal(a, b) for a, b in zip(model.parameters(), _model().parameters(), strict=True)):
        raise AssertionError("the base model changed after merge and unmerge")


_CLASSES: dict[str, Any] = {"main_metric": "accuracy", "eval_base": 500, "labels": ("negative", "positive")}
_SST2 = Glue(name="sst2", columns=("sentence",), **_CLASSES)
_COLA = Glue(name="cola", columns=("sentence",), **_CLASSES)
_STSB = Glue(
    name="stsb", columns=("sentence1", "sentence2"), main_metric="pearson", eval_base=500, label_range=(0.0, 5.0)
)
_MRPC = Glue(name="mrpc", columns=("sentence1", "sentence2"), **_CLASSES)
_SNIPPETS = Snippets(name="snippets", columns=("sentence",), **_CLASSES)
_OASST = Oasst(name="oasst1", eval_base=100)
_ALPACA = Instructions(name="alpaca", eval_base=100)


def _write(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _make_jsonl(folder: Path) -> None:
    for part in ("train", "validation"):
        one = [json.dumps({"sentence": f"a film, {part} {i}", "label": i % 2, "idx": i}) for i in range(6)]
        two = [json.dumps({"sentence1": f"é {i}", "sentence2": part, "label": i / 2, "idx": i}) for i in range(6)]
        _write(folder / "sst2" / f"{part}.jsonl", one)
        _write(folder / "stsb" / f"{part}.jsonl", two)


def _make_tsv(folder: Path) -> None:
    for part in ("train", "dev"):
        _write(folder / "CoLA" / f"{part}.tsv", [f"gj04\t{i % 2}\t*\tA film {part} {i}." for i in range(6)])
        rows = [f"{i}\tfirst {i}\tsecond é\t{i / 2}" for i in range(6)]
        _write(folder / "STS-B" / f"{part}.tsv", ["index\tsentence1\tsentence2\tscore", *rows])
        rows = [f"{i % 2}\t{i}\t{i}\tfirst {i}\tsecond é" for i in range(6)]  # the label first: a tab shifts the texts
        _write(folder / "MRPC" / f"{part}.tsv", ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows])


def _make_snippets(folder: Path) -> None:
    rows = [f"{i}\t{(i % 9) - 4}\tan unremarkable film, number {i}" for i in range(60)]
    _write(folder / "movieReviewSnippets_GroundTruth.txt", rows)


def _message(name: str, role: str, **more: Any) -> dict[str, Any]:
    return {"message_id": name, "role": role, "text": f"says {name} é", "lang": "en", "review_result": True, **more}


def _make_trees(folder: Path) -> None:
    rows = []
    for i in range(40):
        answers = [_message(f"{i}{j}", "assistant", parent_id=str(i), replies=[]) for j in range(2)]
        root = _message(str(i), "prompter", parent_id=None, replies=answers)
        rows.append(json.dumps({"message_tree_id": str(i), "tree_state": "ready_for_export", "prompt": root}))
    _write(folder / "trees.jsonl", rows)


def _make_messages(folder: Path) -> None:
    rows = []
    for i in range(40):
        rows.append(_message(str(i), "prompter", parent_id=None, message_tree_id=str(i)))
        rows.append(_message(f"{i}a", "assistant", parent_id=str(i), message_tree_id=str(i)))
    _write(folder / "messages.jsonl", [json.dumps(row) for row in rows])


def _instructions() -> list[dict[str, str]]:
    return [{"instruction": f"add {i} and two", "input": "é" * (i % 2), "output": f"it is {i + 2}"} for i in range(40)]


def _make_instructions(folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(_instructions(), ensure_ascii=False), encoding="utf-8")


def _make_instruction_lines(folder: Path) -> None:
    _write(folder / "rows.jsonl", [json.dumps(row, ensure_ascii=False) for row in _instructions()])


def _load(*tasks: Task) -> Callable[[Path], None]:
    """A reader of the splits of all tasks and their fingerprints, as a run reads them."""

    def read(folder: Path) -> None:
        for task in tasks:
            _ = task.load(DataConfig(dir=str(folder))).fingerprint

    return read


_GROUPS = {"model": "minilm", "method": "sparsegrad", "task": "sst2", "protocol": "paper", "tracker": "none"}


@cache
def _composed() -> dict[str, Any]:
    composed = compose_run([f"{group}={choice}" for group, choice in _GROUPS.items()], ROOT / "conf")
    return OmegaConf.to_container(composed)  # type: ignore[return-value]


def _make_yaml(folder: Path) -> None:
    for group, choice in _GROUPS.items():
        shutil.copyfile(ROOT / "conf" / group / f"{choice}.yaml", folder / f"{group}.yaml")


def _make_json(folder: Path) -> None:
    """The same configurations as JSON, which is valid YAML and whose values can be changed one by one."""
    for group, choice in _GROUPS.items():
        content = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / f"{choice}.yaml"))
        (folder / f"{group}.json").write_text(json.dumps(content), encoding="utf-8")


@cache
def _good_configs() -> frozenset[bytes]:
    with tempfile.TemporaryDirectory() as name:
        _make_yaml(Path(name))
        _make_json(Path(name))
        return frozenset(path.read_bytes() for path in Path(name).iterdir())


def _read_configs(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.stat().st_size < mutate.HUGE and path.read_bytes() in _good_configs():
            continue  # only one file of an input is damaged: composing the others again would dominate the run time
        check_yaml(path)
        try:
            node = OmegaConf.load(path)
            composed = OmegaConf.create({**_composed(), path.stem: node})
        except (OmegaConfBaseException, OSError) as error:  # in a run, Hydra reports these in one line
            raise UserError(str(error)) from None
        build(composed)


def all_readers() -> dict[str, Reader]:
    """All readers by name."""
    both = ("train", "validation")
    jsonl = {f"{task}/{part}.jsonl": LINES for task in ("sst2", "stsb") for part in both}
    tsv = {f"{task}/{part}.tsv": TEXT for task in ("CoLA", "STS-B", "MRPC") for part in ("train", "dev")}
    yaml = {f"{group}.yaml": (*TEXT, *[mutate.yaml_code] * 4) for group in _GROUPS}
    json_files = [f"{group}.json" for group in _GROUPS]
    return {
        **RESULTS,
        "bases": Reader(_make_bases, {"bases.safetensors": TENSOR_FILE, "bases.json": LINES}, _read_bases),
        "adapters": Reader(_make_adapter, {TENSORS: TENSOR_FILE, FACTS: LINES}, _read_adapter, _repair_adapter),
        "GLUE, JSON lines": Reader(_make_jsonl, jsonl, _load(_SST2, _STSB)),
        "GLUE, official files": Reader(_make_tsv, tsv, _load(_COLA, _STSB, _MRPC)),
        "snippets": Reader(_make_snippets, {"movieReviewSnippets_GroundTruth.txt": TEXT}, _load(_SNIPPETS)),
        "conversation trees": Reader(_make_trees, {"trees.jsonl": LINES}, _load(_OASST)),
        "conversation messages": Reader(_make_messages, {"messages.jsonl": LINES}, _load(_OASST)),
        "instructions": Reader(_make_instructions, {"rows.json": LINES}, _load(_ALPACA)),
        "instruction lines": Reader(_make_instruction_lines, {"rows.jsonl": LINES}, _load(_ALPACA)),
        "configurations": Reader(_make_yaml, yaml, _read_configs),
        "configurations, by value": Reader(_make_json, dict.fromkeys(json_files, mutate.JSON), _read_configs),
        "checkpoints": CHECKPOINTS,
    }
