"""A model of another kind than the task trains is refused before anything is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import Composer

from sparsegrad.errors import UserError
from sparsegrad.models.suitability import check_suitable, find_suitable_sources
from sparsegrad.runs.config import build


@pytest.mark.parametrize(
    ("task", "fields", "said"),
    [
        (
            "alpaca",
            {"model_type": "bert"},
            r"needs a causal language model.*\(bert, from asset:minilm\) sees both ways.*model=smollm2",
        ),
        ("alpaca", {"model_type": "t5"}, r"\(t5, .*\) is none"),
        ("sst2", {"model_type": "vit"}, r"needs a classifier.*\(vit, .*\).*model=minilm"),
        ("alpaca", {"model_type": "llama"}, None),
        ("alpaca", {"model_type": "bert", "is_decoder": True}, None),
        ("alpaca", {"model_type": "t5", "auto_map": {}}, None),
        ("sst2", {"model_type": "llama"}, None),
        ("sst2", {"model_type": "of its own"}, None),
        ("sst2", {"model_type": ["bert"]}, None),  # loading says what is wrong with it
        ("sst2", {}, None),
    ],
)
def test_a_model_of_another_kind_is_refused(conf: Composer, task: str, fields: dict[str, Any], said: str) -> None:
    config = build(conf(f"task={task}"))
    if said is None:
        check_suitable(config.model, config.task, fields)
    else:
        with pytest.raises(UserError, match=said):
            check_suitable(config.model, config.task, fields)


@pytest.mark.parametrize("place", ["asset", "folder"])
def test_it_is_refused_before_it_is_fetched(
    conf: Composer, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(tmp_path / "none"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    models = {"asset": ["model=minilm"], "folder": ["model=smollm2", f"model.source={tmp_path}"]}
    config = build(conf(*models[place], "task=oasst1"))
    with pytest.raises(UserError, match="sees both ways"):
        find_suitable_sources(config.model, config.task)


def test_of_another_source_the_yaml_says_nothing(conf: Composer, tmp_path: Path) -> None:
    config = build(conf("model=minilm", f"model.source={tmp_path / 'none'}", "task=oasst1"))
    with pytest.raises(UserError, match="none does not exist"):
        find_suitable_sources(config.model, config.task)
