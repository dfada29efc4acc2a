"""A hub that refuses: every cause has one line of its own, with its remedy."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import hub_models as made
import pytest
from hub_fixtures import Site, assert_clean, load, point_at
from hub_fixtures import impatient as impatient  # the fixture
from hub_server import Hub, Rule
from run_fixtures import Composer, last_wins

from sparsegrad.assets import hub as client
from sparsegrad.cli import run_command
from sparsegrad.errors import UserError
from sparsegrad.runs.runner import run


def gate(hub: Hub, patch: Any, home: Path) -> None:
    hub.repos[f"models/{made.BERT}"].gated = True


def hide(hub: Hub, patch: Any, home: Path) -> None:
    del hub.repos[f"models/{made.BERT}"]


def hide_with_token(hub: Hub, patch: Any, home: Path) -> None:
    hide(hub, patch, home)
    patch.setenv("HF_TOKEN", "hf_good")


def send_old_token(hub: Hub, patch: Any, home: Path) -> None:
    patch.setenv("HF_TOKEN", "hf_old")


def break_proxy(hub: Hub, patch: Any, home: Path) -> None:
    patch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    patch.setenv("NO_PROXY", "")
    patch.setenv("no_proxy", "")


def refuse_by_proxy(hub: Hub, patch: Any, home: Path) -> None:
    hub.rules.append(Rule("", status=407))


def speak_plainly(hub: Hub, patch: Any, home: Path) -> None:
    point_at(hub.url.replace("http:", "https:"), home, patch)  # no TLS there


def close(hub: Hub, patch: Any, home: Path) -> None:
    point_at("http://127.0.0.1:9", home, patch)


def go_offline(hub: Hub, patch: Any, home: Path) -> None:
    patch.setattr(client.constants, "HF_HUB_OFFLINE", True)


def break_down(hub: Hub, patch: Any, home: Path) -> None:
    hub.rules.append(Rule("", status=503))


def block_folder(hub: Hub, patch: Any, home: Path) -> None:
    home.mkdir(exist_ok=True)
    (home / "hub").write_text("a file where the cache should be")


def drop_weights(hub: Hub, patch: Any, home: Path) -> None:
    repo = hub.repos[f"models/{made.BERT}"]
    repo.push({name: body for name, body in repo.commits[repo.head].items() if name != "model.safetensors"})
    repo.push({name: body for name, body in repo.commits[repo.head].items() if name != "pytorch_model.bin"})


def change_nothing(hub: Hub, patch: Any, home: Path) -> None:
    pass


CAUSES = [
    (hide, [], "is not on the hub, or is private", "check the name"),
    (hide_with_token, [], "is not on the hub, or is private", "check the name"),
    (gate, [], "is gated", "hf auth login"),
    (send_old_token, [], "refuses the token", "hf auth login"),
    (change_nothing, ["model.revision=v9"], "has no such revision", "model.revision="),
    (change_nothing, ["model.source=a/b/c"], "neither a folder here nor a name on the hub", "model.source="),
    (change_nothing, ["model.source=./none"], "does not exist", "hub id"),
    (drop_weights, [], "has no files .*safetensors", "model.source="),
    (break_proxy, [], "proxy", "HTTPS_PROXY"),
    (refuse_by_proxy, [], "status 407", "model.source="),
    (speak_plainly, [], "TLS connection", "SSL_CERT_FILE"),
    (close, [], "cannot be reached .*Connection refused", "hf download"),
    (go_offline, [], "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
    (break_down, [], "server error .*503", "hf download"),
    (block_folder, [], "cannot be stored", "HF_HOME"),
]


@pytest.mark.parametrize(
    ("spoil", "overrides", "cause", "remedy"), CAUSES, ids=[f"{one[0].__name__} {one[1]}" for one in CAUSES]
)
def test_each_cause_has_its_line_and_status_2(
    spoil: Any, overrides: list[str], cause: str, remedy: str, hub: Hub, conf: Composer, places: tuple[str, str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    spoil(hub, monkeypatch, tmp_path / "hf")
    with pytest.raises(SystemExit) as ended:
        run_command(conf(*last_wins("model=bert_base", "task=sst2", "train.device=cpu", *places, *overrides)))
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(errors) == 1
    assert re.match(rf"error: .*{cause}", errors[0]), errors[0]
    assert remedy in errors[0]
    others = {"gated", "not on the hub", "refuses the token", "server error", "TLS connection", "no such revision"}
    assert sum(other in errors[0] for other in others) <= 1


def test_a_refusal_about_a_cached_repository_is_said_and_the_cache_is_used(
    hub: Hub, hub_run: Any, site: Site, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub_run()
    load(config)
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with caplog.at_level(logging.WARNING, "sparsegrad"):
        assert_clean(load(config), site)
    assert "refuses it (status 401): google-bert/bert-base-uncased is read from the cache" in caplog.text


def test_a_run_whose_hub_dies_after_the_model_is_refused_for_the_data(hub: Hub, hub_run: Any) -> None:
    hub.rules.append(Rule("/api/datasets/", drop=True))
    with pytest.raises(UserError, match=rf"data set {made.GLUE} is not in the cache, and the hub cannot be reached"):
        run(hub_run())
