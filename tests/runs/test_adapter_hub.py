"""Adapters on the hub: pushed and loaded they are the same bits, also from the cache; every refusal is one line."""

from __future__ import annotations

import errno
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from adapter_checks import changed, own_model
from hub_fixtures import point_at
from hub_server import Hub, Rule, serve
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import close_session
from model_states import bits, has_bits

from sparsegrad import UserError, load_adapter, push_to_hub, save_adapter, save_lora, set_adapter
from sparsegrad.adapter.format import FACTS, TENSORS

NAME = "me/film"
FILES = {FACTS, TENSORS, "README.md"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub to which this process has the token of an account."""
    with serve() as found:
        point_at(found.url, tmp_path / "hf", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        yield found
    close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = own_model()
    save_adapter(changed(base), tmp_path / "adapter", base, target_modules=["0"])
    (tmp_path / "adapter" / "notes.txt").write_text("private")
    return tmp_path / "adapter"


def test_what_is_pushed_is_what_is_loaded(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = push_to_hub(folder, NAME, private=True)
    repo = hub.repos[f"models/{NAME}"]
    assert repo.private
    assert repo.commits[repo.head] == {name: (folder / name).read_bytes() for name in FILES}
    assert address == f"{hub.url}/{NAME}/commit/{repo.head}"
    model = own_model()
    adapter = load_adapter(model, NAME, "film")
    set_adapter(model, "film")
    assert "\r" not in capsys.readouterr().err  # no terminal: none of the hub's bars
    assert has_bits(model, bits(changed(own_model())))
    assert adapter.source == NAME
    assert repr(adapter).startswith(f"Adapter({NAME!r}, name='film', base='Sequential', ")


def test_a_second_push_is_one_commit_and_a_revision_is_the_earlier_one(hub: Hub, folder: Path) -> None:
    first = push_to_hub(folder, NAME).rpartition("/")[2]
    base = own_model()
    saved = save_adapter(changed(changed(base)), folder, base, target_modules=["0"])  # type: ignore[arg-type]
    push_to_hub(saved, NAME, commit_message="longer training")
    repo = hub.repos[f"models/{NAME}"]
    assert len(repo.commits) == 3  # empty, first, second
    assert repo.message == "longer training"
    for revision, wanted in ((first, changed(base)), (None, changed(changed(base)))):
        model = own_model()
        load_adapter(model, NAME, revision=revision).merge()
        assert has_bits(model, bits(wanted))


def test_the_cache_serves_when_the_hub_does_not(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(folder, NAME)
    load_adapter(own_model(), NAME)
    hub.rules.append(Rule("", status=500))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = own_model()
    load_adapter(model, NAME).merge()
    assert has_bits(model, bits(changed(own_model())))


def test_a_folder_of_the_same_name_comes_first(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "me").mkdir()
    folder.rename(folder.parent / "me" / "film")
    load_adapter(own_model(), NAME)
    assert hub.asked == []


def test_an_interrupted_save_is_pushed_under_the_usual_name(hub: Hub, folder: Path) -> None:
    sha256 = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / TENSORS).rename(folder / f"sparsegrad_adapter.{sha256}.safetensors")
    push_to_hub(folder, NAME)
    repo = hub.repos[f"models/{NAME}"]
    assert repo.commits[repo.head].keys() == FILES


def test_a_damaged_adapter_is_not_published(hub: Hub, folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged .* copy it again"):
        push_to_hub(folder, NAME)
    assert hub.asked == []


def test_a_damaged_lora_adapter_is_not_published_and_an_interrupted_one_is_completed(hub: Hub, tmp_path: Path) -> None:
    base = own_model()
    folder = save_lora(changed(base), tmp_path / "lora", base, rank=2, target_modules=["0"]).folder
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(tensors[:-1])
    with pytest.raises(UserError, match="holds a damaged LoRA adapter"):
        push_to_hub(folder, NAME)
    assert hub.asked == []
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    waiting = folder / ".adapter_model.99.saving"
    waiting.mkdir()
    (folder / "adapter_config.json").rename(waiting / f"{hashlib.sha256(tensors).hexdigest()}.json")
    push_to_hub(folder, NAME)
    assert not waiting.exists()


def test_a_lora_adapter_is_pushed_with_peft_s_names(hub: Hub, tmp_path: Path) -> None:
    base = own_model()
    saved = save_lora(changed(base), tmp_path / "lora", base, rank=2, target_modules=["0"])
    push_to_hub(saved, NAME)
    repo = hub.repos[f"models/{NAME}"]
    assert repo.commits[repo.head].keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    with pytest.raises(UserError, match=rf"me/film on the hub has no {FACTS}.* with peft"):
        load_adapter(base, NAME)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("", drop=True), "cannot be reached or refuses"),
        (Rule("GET|HEAD|POST", status=403), "not on the hub, or this account may not use it: check the name, log in"),
        (Rule("repos.create|preupload|commit", status=401), "not on the hub, or this account may not use it"),
    ],
)
def test_a_refused_push_is_one_line(hub: Hub, folder: Path, rule: Rule, message: str) -> None:
    hub.rules.append(rule)
    with pytest.raises(UserError, match=message) as error:
        push_to_hub(folder, NAME)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("me/flim", "me/flim .no folder here. is not on the hub, or this account may not use it: check the name"),
        ("me/gated", "me/gated .* is gated: ask for access .* log in with"),
        ("me/film--s", "me/film--s .* is not a name on the hub: give org/name, or name a folder"),
    ],
)
def test_a_refused_load_is_one_line(
    hub: Hub, source: str, message: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.add("models/me/gated", {FACTS: b"{}"}, gated=True)
    with pytest.raises(UserError, match=message) as error:
        load_adapter(own_model(), source)
    assert "\n" not in str(error.value)


class Loadable(torch.nn.Linear):
    """A model whose class loads like those of transformers, and notes how it was asked to."""

    options: ClassVar[list[dict[str, Any]]] = []

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> tuple[Loadable, dict[str, set[str]]]:
        cls.options.append(options)
        return cls(2, 2), {"missing_keys": set()}


def save_with_base(folder: Path, base: str) -> None:
    save_adapter(Loadable(2, 2), folder, base, target_modules={"all": ".*"})


def test_a_base_on_the_hub_is_asked_for_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` asks six times for each of five names of files, and then says that the files do not exist."""
    monkeypatch.setattr(Loadable, "options", [])
    hub.add("models/me/base", {"config.json": b"{}"})
    save_with_base(tmp_path / "online", "me/base")
    hf_hub_download("me/base", "config.json")
    hub.rules.append(Rule("", drop=True))
    save_with_base(tmp_path / "cached", "me/base")
    assert ["local_files_only" in options for options in Loadable.options] == [False, True]
    hub.asked.clear()
    with pytest.raises(
        UserError, match=r"base=me/other .*: the hub cannot be reached .* or give base= as the"
    ) as error:
        save_with_base(tmp_path / "away", "me/other")
    assert "\n" not in str(error.value)
    assert len(hub.asked) == 1
    assert len(Loadable.options) == 2


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("me/nope", r"base=me/nope \(no folder here\) is not on the hub.* give base= as"),
        ("./nope", r"base=\./nope: there is no such folder; give base= as"),
    ],
)
def test_a_base_that_the_hub_does_not_have_is_named(hub: Hub, base: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        save_with_base(tmp_path, base)


def test_an_unknown_revision_is_named(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, NAME)
    with pytest.raises(UserError, match="no such revision: give revision="):
        load_adapter(own_model(), NAME, revision="v9")


def test_without_the_client_the_remedy_is_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    calls: list[Any] = [lambda: load_adapter(own_model(), "me/other"), lambda: push_to_hub(folder, NAME)]
    for call in calls:
        with pytest.raises(UserError, match="pip install huggingface_hub"):
            call()
    with pytest.raises(UserError, match="no adapter in"):
        load_adapter(own_model(), folder / "none")


def test_a_hub_that_is_switched_off_is_named_with_the_remedy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="unset HF_HUB_OFFLINE, or name a folder of save_adapter"):
        load_adapter(own_model(), NAME)


def test_a_full_disk_is_not_taken_for_a_hub_that_is_away(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "cache/blobs/x")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot write cache/blobs/x: No space left on device; free"):
        load_adapter(own_model(), NAME)
