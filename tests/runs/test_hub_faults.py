"""A hub that misbehaves: every fault ends in one line, or in the weights of a clean run.

After each fault the hub recovers, and the same command must then give the weights of a clean run: nothing of a broken
download may stay in the cache.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import hub_models as made
import pytest
from hub_fixtures import Site, assert_clean, load, point_at
from hub_fixtures import impatient as impatient  # the fixture
from hub_server import Hub, Rule
from run_fixtures import small_files

from sparsegrad.assets import hub as client
from sparsegrad.errors import UserError
from sparsegrad.tasks.base import DataConfig

INFO, WEIGHTS, SETTING, VOCABULARY = "GET /api/models/", "GET /storage/", "GET .*/config.json", "GET .*/tokenizer.json"


def assert_one_line(error: UserError) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    assert re.search(r"https?://\S+\?", text) is None  # no signed address
    return text


def follow_remedy(error: UserError) -> None:
    """Delete what a damaged download left, as the error says; others leave nothing."""
    if (found := re.search(r"`(rm -r .*?)`", str(error))) is not None:
        assert "is damaged" in str(error)
        subprocess.run(shlex.split(found[1]), check=True)


FAULTS = {
    **{
        f"info {status}": Rule(INFO, status=status)
        for status in (400, 401, 403, 404, 408, 418, 429, 500, 502, 503, 504)
    },
    "info html": Rule(INFO, status=200, body=b"<html>log in</html>"),
    "info empty": Rule(INFO, status=200),
    "info without commit": Rule(INFO, status=200, body=b'{"id": "x", "siblings": []}'),
    "info null": Rule(INFO, status=200, body=b"null"),
    "info cut": Rule(INFO, cut=0.5),
    "info dropped": Rule(INFO, drop=True),
    "info dropped once": Rule(INFO, drop=True, times=1),
    "info silent": Rule(INFO, seconds=5),
    "info circle": Rule(INFO, status=302, headers={"Location": "/api/models/google-bert/bert-base-uncased"}),
    "info nowhere": Rule(INFO, status=302, headers={"Location": "http://127.0.0.1:9/x"}),
    **{f"head {status}": Rule("HEAD .*safetensors", status=status) for status in (401, 403, 404, 429, 500, 503)},
    "head without headers": Rule("HEAD .*safetensors", status=200),
    "head dropped": Rule("HEAD .*safetensors", drop=True),
    "head silent on the first file": Rule("HEAD .*config.json", seconds=5),
    **{f"weights {status}": Rule(WEIGHTS, status=status) for status in (403, 404, 416, 429, 500, 503)},
    "weights 503 once": Rule(WEIGHTS, status=503, times=1),
    "weights html": Rule(WEIGHTS, status=200, body=b"<html>blocked by your administrator</html>"),
    "weights cut": Rule(WEIGHTS, cut=0.5),
    "weights cut once": Rule(WEIGHTS, cut=0.5, times=1),
    "weights empty": Rule(WEIGHTS, cut=0.0),
    "weights dropped": Rule(WEIGHTS, drop=True),
    "weights silent": Rule(WEIGHTS, seconds=1),
    "weights garbled": Rule(WEIGHTS, garble=True),
    "weights nowhere": Rule(WEIGHTS, status=302, headers={"Location": "http://127.0.0.1:9/x"}),
    **{f"config {status}": Rule(SETTING, status=status) for status in (404, 503)},
    "config cut": Rule(SETTING, cut=0.5),
    "config garbled": Rule(SETTING, garble=True),
    **{f"vocabulary {status}": Rule(VOCABULARY, status=status) for status in (404, 503)},
    "vocabulary empty": Rule(VOCABULARY, status=200),
    "vocabulary cut": Rule(VOCABULARY, cut=0.9),
    "vocabulary garbled": Rule(VOCABULARY, garble=True),
    "everything 503": Rule("", status=503),
    "everything dropped": Rule("", drop=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_or_nothing(fault: str, hub: Hub, hub_run: Any, site: Site) -> None:
    config = hub_run()
    rule = FAULTS[fault]
    hub.rules.append(Rule(**vars(rule)))
    refused = None
    try:
        assert_clean(load(config), site)
    except UserError as error:
        refused = error
    if refused is not None:
        assert made.BERT in assert_one_line(refused)
        follow_remedy(refused)
    hub.rules.clear()
    assert_clean(load(config), site)


@pytest.mark.parametrize("fault", ["weights cut", "weights garbled", "weights 503", "info 404", "info html"])
def test_a_fault_of_a_data_set_is_one_line(fault: str, hub: Hub, hub_run: Any) -> None:
    task = hub_run().task
    rule = Rule(**vars(FAULTS[fault]))
    rule.pattern = rule.pattern.replace("models", "datasets")
    hub.rules.append(rule)
    with pytest.raises(UserError) as refused:
        task.load(DataConfig())
    assert made.GLUE in assert_one_line(refused.value)
    assert "data.dir=" in str(refused.value)
    follow_remedy(refused.value)
    hub.rules.clear()
    assert len(task.load(DataConfig()).train) == 20


def damage(path: Path, how: str) -> None:
    """Truncate, change, remove or hide the file behind a link of the cache."""
    blob = path.resolve()
    if how == "truncated":
        os.truncate(blob, blob.stat().st_size // 2)
    elif how == "changed":
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)
    elif how == "gone":
        blob.unlink()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "vocab.txt"])
@pytest.mark.parametrize("how", ["truncated", "changed", "gone"])
def test_a_damaged_cache_is_found_and_the_remedy_works(
    how: str, file: str, hub: Hub, hub_run: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub_run()
    load(config)
    folder = client._find(client.Repository(made.BERT)).folder
    damage(folder / file, how)
    if how == "gone":  # is fetched anew where there is a hub; without one, the error names the file
        with monkeypatch.context() as patch:
            point_at("http://127.0.0.1:9", folder.parents[3], patch)
            with pytest.raises(UserError, match=rf"incomplete in the cache \({file} "):
                load(config)
    else:
        with pytest.raises(UserError, match=rf"{made.BERT} is damaged in the cache \({re.escape(file)} ") as refused:
            load(config)
        follow_remedy(refused.value)
    assert_clean(load(config), site)


def test_a_full_disk_is_named_and_leaves_nothing_behind(hub: Hub, hub_run: Any, site: Site) -> None:
    config = hub_run()
    with small_files(40_000), pytest.raises(UserError, match=r"does not fit on the disk \(File too large\).*HF_HOME"):
        load(config)
    assert not list(Path(client.constants.HF_HUB_CACHE).rglob("*.incomplete"))
    assert_clean(load(config), site)
