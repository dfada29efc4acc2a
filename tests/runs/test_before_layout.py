"""What earlier versions left behind still works: checkpoints, stored bases, studies and adapters made at fb4975d.

`data/before-layout.tar.xz` was written by that commit: three runs of a tiny BERT interrupted after step 3 of 4, an
Optuna study of three trials in a journal, and an adapter with its base, bases and optimizer state.
`data/before-layout.json` holds what the uninterrupted runs had reached.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import Composer
from safetensors.torch import load_file
from test_runs import Stop
from transformers import AutoModelForSequenceClassification

from sparsegrad import load_adapter, prepare
from sparsegrad.basis import load_bases
from sparsegrad.runs.config import build
from sparsegrad.runs.runner import run
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.study import load_study

DATA = Path(__file__).parent / "data"
FACTS = json.loads((DATA / "before-layout.json").read_text())
FIXED = (*FACTS["tiny"], *FACTS["places"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old files, in the working directory: their runs name tokenizer and data by relative paths."""
    with tarfile.open(DATA / "before-layout.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("before", FACTS["runs"], ids=lambda run: " ".join(run["overrides"]))
def test_a_checkpoint_continues_to_the_same_end(folder: Path, conf: Composer, before: dict[str, Any]) -> None:
    config = build(conf(*FIXED, *FACTS["short"], *before["overrides"]))
    assert config.key == before["key"]
    watch = Stop()
    record, is_new = run(config, callbacks=[watch])
    assert is_new
    assert watch.began == 2
    assert record["environment"]["seconds"] is None, "the checkpoint does not say how long it took"
    for curve in ("losses", "evaluations"):
        assert len(record[curve]) == len(before[curve])
        for row, expected in zip(record[curve], before[curve], strict=True):
            assert row == pytest.approx(expected, rel=1e-5)


def test_a_stored_basis_that_knows_its_tokenizer_by_name_alone_is_made_anew(folder: Path, conf: Composer) -> None:
    """It may have been made with a tokenizer of that name without words; now the vocabulary is in the fingerprint."""
    before = FACTS["runs"][0]
    config = build(conf(*FIXED, *FACTS["short"], *before["overrides"], "resume=false"))
    record, _ = run(config)
    assert not record["calibration"]["reused"]
    assert record["calibration"]["fingerprint"] != before["fingerprint"]


def test_a_study_goes_on_where_it_stopped(folder: Path, conf: Composer) -> None:
    short = [override for override in FACTS["short"] if not override.startswith("train.lr")]
    space = "{train.lr:{float:[1e-5,1e-1],log:true},method.steps:{int:[10,60],step:10}}"
    storage = "journal:study.journal"
    run_sweep(
        conf(
            *FIXED, *short, "sweep=custom", "sweep.trials=5", f"sweep.space={space}", "sweep.runner=sweep_fakes.run",
            "protocol.patience=null", "sweep.study=s", "sweep.heartbeat=0.2", f"sweep.storage={storage}",
        )
    )  # fmt: skip
    trials = load_study(storage, "s").trials
    assert [trial.params for trial in trials[:3]] == [before["params"] for before in FACTS["study"]["trials"]]
    assert len(trials) == 5


def test_an_adapter_still_gives_the_trained_model(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "adapter" / "base")
    load_adapter(model, folder / "adapter" / "saved").merge()
    trained = load_file(folder / "adapter" / "trained.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_bases_and_optimizer_state_still_load(folder: Path) -> None:
    bases = load_bases(folder / "adapter" / "bases.safetensors")
    state = torch.load(folder / "adapter" / "optimizer.pt", weights_only=True)
    saved = {group["kind"]: group["basis"] for group in state["param_groups"] if group.get("kind")}
    assert bases.keys() == saved.keys()
    assert all(torch.equal(bases[kind].in_basis, saved[kind]["in_basis"]) for kind in bases)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "adapter" / "base")
    kept = {name: state["param_groups"][0][name] for name in ("keep", "density")}
    optimizer = prepare(model, None, bases=bases, **kept)
    optimizer.load_state_dict(state)
    assert len(optimizer.state) == len(state["state"]) > 0
