"""The hub is away, or is not to be asked: one short wait, or none, and runs from the cache."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_models as made
import pytest
from hub_server import Hub, Rule
from run_fixtures import Composer

from sparsegrad.assets import hub as client
from sparsegrad.errors import UserError
from sparsegrad.models.source import find_sources
from sparsegrad.runs.config import build
from sparsegrad.runs.runner import run


def test_a_full_cache_costs_one_request_per_repository(hub: Hub, hub_run: Any) -> None:
    run(hub_run())
    hub.asked.clear()
    run(hub_run("force=true"))
    about = [request for request in hub.asked if "agent-harnesses" not in request]  # asked once a day
    assert about == [f"GET /api/models/{made.BERT}?blobs=true", f"GET /api/datasets/{made.GLUE}?blobs=true"]
    hub.asked.clear()
    commit = hub.repos[f"models/{made.BERT}"].head
    find_sources(hub_run(f"model.revision={commit}").model)
    assert hub.asked == []


def make_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.constants, "ENDPOINT", "http://127.0.0.1:9")


def make_silent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rules.append(Rule("", seconds=60))


def make_broken(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rules.append(Rule("", status=503))


def make_busy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rules.append(Rule("", status=429))


def make_portal(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rules.append(Rule("", status=200, body=b"<html>please log in to this network</html>"))


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (make_unreachable, "Connection refused"),
        (make_silent, "no answer from .* within 0.5 seconds"),
        (make_broken, "server error .*503"),
        (make_busy, "429"),
        (make_portal, "not as a hub does"),
    ],
)
def test_with_a_full_cache_a_hub_that_is_away_costs_one_short_wait(
    spoil: Any, cause: str, hub: Hub, hub_run: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    first, _ = run(hub_run())
    assert client._QUICK <= 5
    monkeypatch.setattr(client, "_QUICK", 0.5)
    spoil(hub, monkeypatch)
    hub.asked.clear()
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "sparsegrad"):
        again, _ = run(hub_run("force=true"))
    assert time.monotonic() - start < 8  # of which the run itself is most
    said = [one.getMessage() for one in caplog.records if one.name == "sparsegrad.assets.hub"]
    assert len(said) == 1
    assert re.search(rf"{cause}.*{made.BERT} is read from the cache$", said[0])
    assert len([one for one in hub.asked if "agent-harnesses" not in one]) <= 1
    assert again["result"]["weights"] == first["result"]["weights"]
    assert again["source"] == first["source"]


def test_hf_hub_offline_asks_nothing_and_says_nothing(
    hub: Hub, hub_run: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    run(hub_run())
    hub.asked.clear()
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    run(hub_run("force=true"))
    assert hub.asked == []
    assert "cache" not in caplog.text


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (("model.weights=random",), "set model.tokenizer=asset:minilm, which needs no hub"),
        (("model.source=asset:minilm", "model.tokenizer=org/other"), "model.tokenizer=, or null for the model's own"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_has_its_own_remedy(
    given: tuple[str, ...], remedy: str, conf: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights need no hub, but the tokenizer does: another model would not help."""
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(client.constants, "HF_HUB_CACHE", str(tmp_path))
    config = build(conf("model=roberta_base", *given)).model
    with pytest.raises(UserError, match=rf"is not in the cache, .*{remedy}"):
        find_sources(config)
    assert find_sources(replace(config, tokenizer="asset:minilm")).tokenizer.folder is not None
