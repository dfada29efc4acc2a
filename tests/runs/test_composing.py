"""Cells are composed by choice and value, and are what Hydra composes from the same words."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from run_fixtures import ROOT

from sparsegrad.runs.composing import compose_run, read_sweep

CONF = ROOT / "conf"
PAPER = "experiment=evidence_paper"


def by_hydra(overrides: list[str], conf: Path = CONF) -> DictConfig:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", overrides)


def content(composed: DictConfig) -> tuple[Any, ...]:
    """All that a composition decides: values with their types, interpolations, and whether new keys are refused."""
    return repr(OmegaConf.to_container(composed, resolve=False)), OmegaConf.is_struct(composed)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [PAPER, "method=lora", "task=cola", "seed=3705"],
        ["seed=7", "method=peft/dora", "train.lr=3e-5", PAPER, "train.lr=1e-4"],
        [PAPER, "hparams=null", "results_dir=/tmp/a b/c", "work_dir='x,y'", "data.dir=${results_dir}/glue"],
        ["method=sparsegrad", "method.engine=layer", "method.density=0.05", "method.sides=null"],
        ["experiment=compare", "method=lora", "evidence.seeds=[1,2]", "train.precision=bf16"],
        ["model=minilm", "model.architecture={num_hidden_layers:2}", "model.weights=random"],
        ["sweep=custom", "sweep.space={train.lr:{float:[1e-5,1e-1],log:true}}"],
        [PAPER, "+model.architecture.extra=1", "seed=3"],
        [PAPER, "~evidence", "seed=3"],
        ["method=lora", "method.rank=4", "method={rank: 3}"],
        ["model.lr=${seed}", "model={lr: '${seed}1'}"],
    ],
)
def test_it_is_what_hydra_composes(overrides: list[str]) -> None:
    expected = content(by_hydra(overrides))
    assert content(compose_run(overrides, CONF)) == expected
    changed = compose_run(overrides, CONF)
    changed.train.lr = 17.0  # of the caller's own copy
    assert content(compose_run(overrides, CONF)) == expected


@pytest.mark.parametrize("word", ["train.rate=1", "method=lorra", "seed=1,2", "train.lr=[", "method@x=lora", "seed"])
def test_what_hydra_refuses_is_refused_with_its_words(word: str) -> None:
    errors = []
    for make in (by_hydra, lambda words: compose_run(words, CONF)):
        with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
            make([PAPER, word])
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    path = conf / "experiment" / "evidence_paper.yaml"
    before, sweep = compose_run([PAPER, "seed=1"], conf), read_sweep("evidence_paper", conf)
    assert sweep == read_sweep("evidence_paper", CONF)
    path.write_text(path.read_text().replace("patience: 5", "patience: 6").replace("task: stsb,", "task: rte,stsb,"))
    os.utime(path, ns=(1, 1))  # even to an older one
    assert compose_run([PAPER, "seed=1"], conf).protocol.patience == before.protocol.patience + 1
    assert read_sweep("evidence_paper", conf) != sweep
