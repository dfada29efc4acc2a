"""Every mistake ends with one line on stderr that names value, choices and remedy, status 2, and no traceback."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bad_input_cases import Refused, error_line
from bad_input_cases import nothing_loaded as nothing_loaded  # the fixtures
from bad_input_cases import refused as refused
from run_fixtures import RunPy, write_rows

from sparsegrad.assets import download as assets
from sparsegrad.assets.download import assets_root
from sparsegrad.basis import Basis, save_bases
from sparsegrad.errors import UserError
from sparsegrad.runs.preflight import check_rows
from sparsegrad.runs.tokenized_splits import token_sets
from sparsegrad.trainer.processes import connect


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=-1e-3", r"train\.lr=-0\.001 .*above 0 and below 10"),
        ("train.lr=0", r"train\.lr=0 .*above 0"),
        ("train.lr=fast", r"train\.lr=fast .*a number"),
        ("train.lr=nan", r"train\.lr=nan .*a number"),
        ("train.lr=null", r"train\.lr=None .*a number"),
        ("train.lr=[1e-3]", r"train\.lr=\[0\.001\] .*a number"),
        ("train.batch_size=0", r"train\.batch_size=0 .*at least 1"),
        ("train.batch_size=null", r"train\.batch_size=None .*whole number"),
        ("train.batch_size=2.5", r"train\.batch_size=2\.5 .*whole number"),
        ("train.batch_size=25", r"train\.batch_size=25 .*24 training rows.*data\.max_train"),
        ("train.weight_decay=1", r"train\.weight_decay=1 .*below 1"),
        ("train.precision=fp16", r"train\.precision=fp16 .*fp32, bf16"),
        ("train.train_rest=maybe", r"train\.train_rest=maybe .*True, False"),
        ("train.device=tpu", r"train\.device=tpu .*auto, cpu, cuda"),
        ("train=3", r"train=3 .*train\.x=y"),
        ("method.density=0", r"density=0 .*above 0 and at most 1"),
        ("method.density=1.5", r"density=1\.5 .*at most 1"),
        ("method.density=-0.1", r"density=-0\.1 .*above 0"),
        ("method.keep=5", r"method\.density=0\.01 and method\.keep=5: give one"),
        ("method.density=null", r"method\.density=None and method\.keep=None: give one"),
        ("method.steps=0", r"method\.steps=0 .*at least 1"),
        ("method.engine=slow", r"method\.engine=slow .*exact, layer, fast"),
        (
            "method.backward=sparse_dense",
            r"backward=sparse_dense does not belong to method\.engine=exact: set method\.b",
        ),
        ("method.sides=left", r"method\.sides=left is not allowed: choose one of both, in, out, small"),
        ("method.moments=few", r"method\.moments=few is not allowed: choose one of dense, support"),
        ("method.save_dtype=int8", r"method\.save_dtype=int8 is not allowed: choose one of null, bf16"),
        ("method._target_=os.nothing", r"method\._target_=os\.nothing cannot be imported"),
        ("+method.rank=3", r"method\.rank=3 .*has no rank"),
        ("protocol.epochs=0", r"protocol\.epochs=0 .*above 0"),
        ("protocol.select=test", r"protocol\.select=test .*validation, heldout"),
        ("protocol.patience=0", r"protocol\.patience=0 .*at least 1; null"),
        ("protocol.max_steps=[1,2]", r"protocol\.max_steps=\[1, 2\] .*whole number"),
        ("data.max_length=1", r"data\.max_length=1 .*at least 4"),
        ("data.max_train=3", r"train\.batch_size=4 .*3 training rows"),
        ("data.max_eval=1", r"1 validation row: give at least 2"),
        ("data.pad=left", r"data\.pad=left .*longest, max_length"),
        ("tracker.name=mlflow", r"tracker\.name=mlflow .*none, wandb, tensorboard"),
        ("+tracker.project=3", r"tracker\.project=3 .*give a text"),
        ("seed=abc", r"seed=abc .*whole number"),
        ("seed=-1", r"seed=-1 .*from 0"),
        ("seed=null", r"seed=None .*whole number"),
        ("name=../x", r"name=\.\./x .*one folder name"),
        ("name=''", r"name= .*give a text"),
        ("name=7", r"name=7 .*in quotes: name=\\'7\\'|name=7 .*give a text"),
        ("results_dir=null", r"results_dir=None .*give a text"),
        ("force=perhaps", r"force=perhaps .*True, False"),
        ("model.weights=old", r"model\.weights=old .*pretrained, random"),
        ("model.head='('", r"model\.head=\( is not a regular expression"),
        ("model.source=null", r"model\.source=None .*give a text"),
        ("+model.size=3", r"model\.size=3 .*has no size"),
        ("seed=${nowhere}", r"the configuration cannot be resolved: .*nowhere"),
        ("seed=???", r"the configuration cannot be resolved: .*[Mm]issing"),
        ("train.device=cuda", r"train\.device=cuda .*no CUDA device; use auto or cpu"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_loaded(refused: Refused, override: str, message: str) -> None:
    if override == "train.device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert re.search(message, refused(override))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method.density=null", "method.keep=2049"), r"keep=2049 .*to 2048.*\(64, 32\) has 2048 entries"),
        (("method.density=1e-6",), r"density=1e-06 keeps no entry .*at least"),
        (("method.engine=layer", "method.sides=small"), r"sides=small does not belong to .*engine=layer: .*sides=both"),
        (
            ("method.release_gradients=true", "train.grad_accumulation=2"),
            r"release_gradients=true does not go with train",
        ),
        (("method=lora", "method.rank=0"), r"method\.rank=0 .*at least 1"),
        (("method=lora", "method.rank=33"), r"method\.rank=33 .*to 32"),
        (("method.basis=nowhere.safetensors",), r"no basis file nowhere\.safetensors"),
        (("data.max_length=4096",), r"data\.max_length=4096 .*at most 512"),
        (("model.mlp=gpt9",), r"mlp=gpt9 .*bert, roberta"),
        (("model.mlp={up: '.*up'}",), r"no linear of kind up, model\.mlp="),
        (("model.architecture=3",), r"model\.architecture=3 .*fields"),
        (("model.architecture.num_attention_heads=3",), r"model\.architecture=.* makes no model"),
        (("model.architecture.model_type=brt",), r"model\.architecture=.* makes no model"),
        (("model.architecture=null",), r"model\.architecture=None .*fields"),
        (("model.weights=pretrained", "model.source=./nowhere"), r"model source \./nowhere does not exist"),
        (("model.tokenizer=asset:big",), r"asset=big .*minilm"),
    ],
)
def test_what_does_not_fit_the_model_is_named(refused: Refused, overrides: tuple[str, ...], message: str) -> None:
    assert re.search(message, refused(*overrides))


def test_run_py_prints_one_line(run_py: RunPy) -> None:
    done = run_py("train.lr=fast")
    assert done.returncode == 2
    assert error_line(done.stderr) == done.stderr.strip()


def test_a_missing_hub_is_named_within_seconds(run_py: RunPy) -> None:
    start = time.monotonic()
    done = run_py("model=roberta_base")
    assert done.returncode == 2
    line = error_line(done.stderr)
    assert "hf download FacebookAI/roberta-base" in line
    assert "HF_HOME" in line
    assert "model=minilm" in line
    done = run_py("task=cola")
    assert done.returncode == 2
    assert re.search(r"nyu-mll/glue .*data\.dir=", error_line(done.stderr))
    assert time.monotonic() - start < 40  # the hub's client alone would try for a minute


@pytest.mark.usefixtures("nothing_loaded")
def test_missing_and_malformed_data_are_named(refused: Refused, tmp_path: Path) -> None:
    assert re.search(r"tried .*nowhere.sst2.train\.jsonl", refused(f"data.dir={tmp_path / 'nowhere'}"))
    lines = write_rows(tmp_path / "data") / "sst2" / "train.jsonl"
    lines.write_text(lines.read_text() + '{"sentence": "cut')
    assert re.search(r"sst2.train\.jsonl line 25: not valid JSON", refused(f"data.dir={tmp_path / 'data'}"))
    lines.write_text('{"sentence": "fine", "label": 2}\n')
    assert re.search(
        r"line 1: label 2 does not fit task=sst2: .*0 \(negative\)", refused(f"data.dir={tmp_path / 'data'}")
    )


def test_a_corrupt_asset_is_named_with_its_hash(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("minilm", "snippets"):
        shutil.copytree(assets_root() / name, tmp_path / "assets" / name)
    (damaged,) = (tmp_path / "assets" / "snippets").iterdir()
    damaged.write_bytes(damaged.read_bytes() + b"x")
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(tmp_path / "assets"))
    assets._verified.cache_clear()
    line = refused("task=snippets", "data.dir=null")
    assert re.search(
        rf"{damaged.name} is corrupt: expected sha256 [0-9a-f]{{64}}, found [0-9a-f]{{64}}; "
        "run `python -m sparsegrad.assets snippets`",
        line,
    )


def test_basis_files_of_other_models_and_damaged_ones_are_named(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_bases(path, {kind: Basis(torch.eye(8), torch.eye(16)) for kind in ("intermediate", "output")})
    line = refused(f"method.basis={path}")
    assert "(16, 8)" in line
    assert "(64, 32)" in line
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is not a readable basis file" in refused(f"method.basis={path}")


def test_a_missing_tracker_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = refused("tracker=wandb")
    assert "pip install -e '.[wandb]'" in line
    assert "tracker=none" in line


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_several_processes_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """As in a cluster's job that exports its size: each process would train alone, on its part of each batch."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2 is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start"):
        connect(torch.device(device))


@pytest.mark.parametrize("check", ["rows", "windows"])
def test_rows_must_fill_a_batch_of_all_processes(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """With fewer, the calibration would wait for its first batch forever."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    task = SimpleNamespace(name="sst2", tokens=lambda rows, *_: (rows, {}))
    config: Any = SimpleNamespace(
        task=task, data=None, protocol=SimpleNamespace(select="validation"), train=SimpleNamespace(batch_size=4)
    )

    def call(rows: int) -> None:
        splits: Any = SimpleNamespace(train=range(rows), validation=range(10))
        if check == "rows":
            check_rows(config, splits)
        else:
            token_sets(config, splits, None)

    call(8)
    with pytest.raises(UserError, match=f"train.batch_size=4 with 2 processes is not allowed: .* 7 .*{check}"):
        call(7)
