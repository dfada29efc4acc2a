"""A hub on loopback with a tiny model of each layout, and this process's clients pointed at it with an empty cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_models as made
import pytest
import torch
from hub_server import Hub, serve
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from run_fixtures import SHORT, Composer, last_wins

from sparsegrad.assets import hub as client
from sparsegrad.models.loading import load_model, load_tokenizer
from sparsegrad.runs.config import RunConfig, build


@dataclass(frozen=True)
class Site:
    """Files of every repository, and the tensors that its checkpoint was made from."""

    files: dict[str, dict[str, bytes]]
    tensors: dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    bert, roberta = made.make_bert(), made.make_roberta()
    llama = made.make_llama(tmp_path_factory.mktemp("llama"))
    models = {made.BERT: bert, made.ROBERTA: roberta, made.LLAMA: llama}
    files = {f"models/{name}": found for name, (found, _) in models.items()}
    files |= {f"datasets/{made.GLUE}": made.make_glue(), f"datasets/{made.OASST}": made.make_oasst()}
    return Site(files, {name: tensors for name, (_, tensors) in models.items()})


@pytest.fixture
def hub(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub; Llama is gated."""
    with serve() as found:
        for name, files in site.files.items():
            found.add(name, files, gated=name.endswith(made.LLAMA))
        point_at(found.url, tmp_path / "hf", monkeypatch)
        yield found
    close_session()


def point_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's clients use the hub at `url` and the cache in `home`, as HF_ENDPOINT and HF_HOME do."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(client, "_trouble", None)
    close_session()


@pytest.fixture
def hub_run(conf: Composer, places: tuple[str, str]) -> Any:
    """`hub_run(*overrides)`: a short run of BERT on sst2, both from the hub."""

    def configuration(*overrides: str) -> RunConfig:
        return build(conf(*last_wins("model=bert_base", *SHORT, "model.lora_rank=2", *places, *overrides)))

    return configuration


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's waits between its attempts take no time, and its patience is short. For modules that import it."""
    no_wait = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
    monkeypatch.setattr("huggingface_hub.file_download.time", no_wait)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(client, "_PATIENT", 0.8)
    monkeypatch.setattr(client, "_QUICK", 0.5)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load(config: RunConfig) -> tuple[Any, Any]:
    """Tokenizer and model, with a new head that is always the same."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.model)
    return tokenizer, load_model(config.model, config.task, tokenizer)


def assert_clean(found: tuple[Any, Any], site: Site) -> None:
    """Check that tokenizer and weights are those of the hub's BERT."""
    tokenizer, model = found
    assert tokenizer("good film")["input_ids"] == [2, 8, 11, 3]
    for name, parameter in model.bert.named_parameters():
        assert torch.equal(parameter, site.tensors[made.BERT][f"bert.{name}"]), name
