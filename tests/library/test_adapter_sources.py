"""What an adapter is made from: any model and base a user has, and never a base that only seems to be one."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_checks import Prepared, changed, own_model, stored
from model_states import bits, has_bits
from torch import nn
from toy_models import toy_batches, toy_model

from sparsegrad import (
    UserError,
    active_adapter,
    delete_adapter,
    disable_adapter,
    get_adapters,
    load_adapter,
    prepare,
    save_adapter,
    save_lora,
    set_adapter,
)
from sparsegrad.adapter.card import remove_card
from sparsegrad.adapter.format import FACTS
from sparsegrad.adapter.lora_files import CONFIG


def test_a_model_of_ones_own_is_saved_by_the_names_given_to_prepare(tmp_path: Path) -> None:
    base = own_model()
    with pytest.raises(UserError, match=r"no known layout .*give target_modules="):
        save_adapter(changed(base), tmp_path, base)
    for names in ({"first": "0"}, ["0"]):
        saved = save_adapter(changed(base), tmp_path, base, target_modules=names)
        assert saved.mlp_bytes > 0
        assert stored(tmp_path)["0.weight"]["base_sha256"] is not None
        fresh = own_model()
        load_adapter(fresh, tmp_path).merge()
        assert has_bits(fresh, bits(changed(base)))


def test_names_and_an_optimizer_together_are_refused(tmp_path: Path) -> None:
    base = own_model()
    model = changed(base)
    with pytest.raises(UserError, match=r"target_modules=\['1'\] and optimizer=: give one"):
        save_adapter(model, tmp_path, base, Prepared(model[0].weight), target_modules=["1"])


def test_what_is_loaded_for_a_compiled_model_is_loaded_for_the_plain_one(tmp_path: Path) -> None:
    base = own_model()
    model = changed(base)
    save_adapter(model, tmp_path, base, target_modules=["0"])
    fresh = copy.deepcopy(base)
    compiled = torch.compile(fresh, backend="eager")
    adapter = load_adapter(compiled, tmp_path, "film")
    assert list(get_adapters(compiled)) == list(get_adapters(fresh)) == ["film"]
    set_adapter(compiled, adapter)
    assert (active_adapter(compiled), active_adapter(fresh)) == ("film", "film")
    assert has_bits(fresh, bits(model))
    with disable_adapter(compiled):
        assert has_bits(fresh, bits(base))
    delete_adapter(compiled, "film")
    assert has_bits(fresh, bits(base))


@pytest.mark.parametrize("call", [get_adapters, active_adapter, lambda model: set_adapter(model, None),
                                  lambda model: load_adapter(model, "."), lambda model: delete_adapter(model, "film"),
                                  lambda model: disable_adapter(model).__enter__()])  # fmt: skip
def test_adapters_of_a_wrapped_model_are_refused(call: Any) -> None:
    with pytest.raises(UserError, match=r"wrapped by DataParallel: give the plain one, model\.module"):
        call(nn.DataParallel(nn.Linear(2, 2)))


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize(("prepared", "given"), [(True, True), (True, False), (False, True)])
def test_a_compiled_model_is_saved_as_the_plain_one(
    prepared: bool, given: bool, tolerance: float, tmp_path: Path
) -> None:
    """Prepared compiled or plain, saved compiled or plain: the same files."""
    base = toy_model("bert", torch.float32)
    model, batches = copy.deepcopy(base), toy_batches("bert", 2)
    compiled = torch.compile(model, backend="eager")
    optimizers = {
        which: prepare(model_, batches, calibration_steps=2, keep=4)
        for which, model_ in ((True, compiled), (False, model))
    }
    model(**batches[0]).loss.backward()
    optimizers[prepared].step()
    wanted = save_adapter(model, tmp_path / "plain", base, optimizers[False], tolerance=tolerance)
    found = save_adapter(
        compiled if given else model, tmp_path / "compiled", base, optimizers[prepared], tolerance=tolerance
    )
    assert (found.forms, found.mlp_bytes, found.lora_bytes) == (wanted.forms, wanted.mlp_bytes, wanted.lora_bytes)
    assert ("rotated" in found.forms) == (tolerance > 0)
    assert (tmp_path / "compiled" / FACTS).read_bytes() == (tmp_path / "plain" / FACTS).read_bytes()
    save_adapter(model, tmp_path / "compiled", torch.compile(base, backend="eager"), optimizers[prepared])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "0.weight"},
        lambda tensors: {},
    ],
)
def test_tensors_of_other_names_are_no_base(spoil: Any, tmp_path: Path) -> None:
    """Stored as new, they would be merged into any model of these shapes."""
    base = own_model()
    model = changed(base)
    with pytest.raises(
        UserError, match=r"base= has no tensor 0\.weight, .* names of the plain model, as a copy of its"
    ):
        save_adapter(model, tmp_path / "adapter", spoil(bits(base)), Prepared(model[0].weight))
    assert not (tmp_path / "adapter").exists()


def test_tensors_without_a_head_are_a_base_and_the_head_is_new(tmp_path: Path) -> None:
    base = own_model()
    model = changed(base)
    before = {name: tensor for name, tensor in bits(base).items() if not name.startswith("1.")}
    save_adapter(model, tmp_path, before, Prepared(model[0].weight))
    assert stored(tmp_path)["1.weight"]["base_sha256"] is None
    stranger: nn.Module = own_model()
    with torch.no_grad():
        stranger[0].weight[0, 0] += 1  # type: ignore[index]
    with pytest.raises(UserError, match=r"0\.weight is not the base's"):
        load_adapter(stranger, tmp_path)


def save(folder: Path, base: nn.Sequential, **settings: Any) -> None:
    model = changed(base)
    save_adapter(model, folder, base, Prepared(model[0].weight), **settings)


@pytest.mark.parametrize(
    ("base_path", "model_path", "name"),
    [
        ("/home/me/minilm", None, "minilm"),  # the path is private
        ("org/base", "/home/me/checkpoint-500", "org/base"),
        (None, "org/base", "org/base"),  # a base of tensors, as in a run
        (None, None, None),  # a class is nothing that anybody can load
    ],
)
def test_an_adapter_names_the_base_as_a_user_loads_it(
    base_path: str | None, model_path: str | None, name: str | None, tmp_path: Path
) -> None:
    base: Any = own_model()
    model: Any = changed(base)
    base.config, model.config = (SimpleNamespace(_name_or_path=path) for path in (base_path, model_path))
    for base_ in [base] if base_path else [base, bits(base)]:
        save_adapter(model, tmp_path / "adapter", base_, target_modules=["0"])
        save_lora(model, tmp_path / "lora", base_, rank=2)
        assert json.loads((tmp_path / "adapter" / FACTS).read_text())["base"] == (name or "Sequential")
        assert json.loads((tmp_path / "lora" / CONFIG).read_text())["base_model_name_or_path"] == name
        for folder in ("adapter", "lora"):
            lines = (tmp_path / folder / "README.md").read_text().splitlines()
            assert [line for line in lines if line.startswith("base_model")] == (
                [f'base_model: "{name}"'] if name else []
            )
            assert any(line.endswith(f"dapter for {name or 'a Sequential'}") for line in lines)


def test_a_card_that_nobody_touched_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, own_model())
    first = (tmp_path / "README.md").read_text()
    base = nn.Sequential(nn.Linear(400, 30), nn.Linear(30, 3))
    save(tmp_path, base)
    second = (tmp_path / "README.md").read_text()
    assert first != second
    (tmp_path / "README.md").write_bytes(second.replace("\n", "\r\n").encode())
    save(tmp_path, own_model())
    assert (tmp_path / "README.md").read_text() == first
    assert not caplog.records


def test_a_card_of_the_other_format_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, own_model())
    (tmp_path / FACTS).unlink()
    base = own_model()
    model = copy.deepcopy(base)
    with torch.no_grad():
        model[0].weight += 1
    save_lora(model, tmp_path, base, rank=2)
    assert "save_lora wrote this card" in (tmp_path / "README.md").read_text()
    assert not caplog.records
    remove_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: b"# Mine\n",
        lambda card: b"",
        lambda card: b"\xff\xfe",
        lambda card: card.replace(b"to be added by whoever trained it", b"accuracy 0.93"),
        lambda card: card + b"Trained on one GPU.\n",
        lambda card: b"\n" + card,
        lambda card: card[:-2],
        lambda card: card.rpartition(b"\n<!--")[0],  # as of before cards had a last line
    ],
)
def test_a_readme_that_somebody_wrote_or_edited_stays(
    edit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, own_model())
    path = tmp_path / "README.md"
    mine = edit(path.read_bytes())
    path.write_bytes(mine)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, own_model())
    assert path.read_bytes() == mine
    assert f"{path} stays as it is" in caplog.text
    remove_card(tmp_path)
    assert path.read_bytes() == mine
