"""Several named adapters of one base: after any order of calls, the weights are those of one of them, or the base's."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import changed, own_model
from model_states import bits, has_bits
from torch import nn

from sparsegrad import (
    UserError,
    active_adapter,
    delete_adapter,
    disable_adapter,
    get_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)

NAMES = ("film", "travel", "law")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter per name, each of another model with other changed tensors."""
    place = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(NAMES):
        save_adapter(trained(name), place / name, own_model(), target_modules=[str(number % 2)])
    return {name: place / name for name in NAMES}


def trained(name: str | None) -> nn.Module:
    """The model of an adapter; None: the base."""
    base = own_model()
    if name is None or name == "film":
        return base if name is None else changed(base)
    with torch.no_grad():
        base[NAMES.index(name) % 2].weight += 0.5  # type: ignore[operator]
    return base


@pytest.fixture
def model(folders: dict[str, Path]) -> nn.Module:
    model = own_model()
    for name, folder in folders.items():
        load_adapter(model, folder, adapter_name=name)
    return model


def test_any_order_of_switching_ends_in_exactly_that_adapter(model: nn.Module) -> None:
    steps: list[str | None] = [*NAMES, None] * 4
    random.Random(0).shuffle(steps)
    for name in steps:
        set_adapter(model, name)
        assert active_adapter(model) == name
        assert has_bits(model, bits(trained(name)))


def test_loading_while_another_is_active_keeps_that_one(folders: dict[str, Path]) -> None:
    model = own_model()
    set_adapter(model, load_adapter(model, folders["film"], "film"))
    load_adapter(model, folders["travel"], "travel")
    assert has_bits(model, bits(trained("film")))
    assert list(get_adapters(model)) == ["film", "travel"]
    with pytest.raises(UserError, match="no adapter in"):
        load_adapter(model, folders["film"].parent, "law")
    assert has_bits(model, bits(trained("film")))
    assert (active_adapter(model), list(get_adapters(model))) == ("film", ["film", "travel"])
    set_adapter(model, "travel")
    assert has_bits(model, bits(trained("travel")))


def test_an_adapter_without_a_name_is_active_by_its_source(model: nn.Module, folders: dict[str, Path]) -> None:
    adapter = load_adapter(model, folders["law"])
    set_adapter(model, adapter)
    assert active_adapter(model) == str(folders["law"])
    assert set(get_adapters(model)) == set(NAMES)
    assert "name='film'" in repr(get_adapters(model)["film"])


def test_deleting_the_active_adapter_restores_the_base_and_frees_its_values(model: nn.Module) -> None:
    set_adapter(model, "film")
    values = weakref.ref(get_adapters(model)["film"]._patches["0.weight"].values)
    delete_adapter(model, "film")
    gc.collect()
    assert values() is None
    assert has_bits(model, bits(trained(None)))
    assert (active_adapter(model), list(get_adapters(model))) == (None, ["travel", "law"])
    delete_adapter(model, "law")
    assert list(get_adapters(model)) == ["travel"]


@pytest.mark.parametrize("name", ["film", None])
def test_disabled_for_a_block_even_if_it_fails(model: nn.Module, name: str | None) -> None:
    set_adapter(model, name)
    block = disable_adapter(model)
    block.__enter__()
    assert has_bits(model, bits(trained(None)))
    assert active_adapter(model) is None
    with pytest.raises(KeyError):
        block.gen.throw(KeyError())  # as when the block raises
    assert has_bits(model, bits(trained(name)))
    assert active_adapter(model) == name


@pytest.mark.parametrize(
    "call",
    [
        lambda model, folder: set_adapter(model, "travel"),
        lambda model, folder: set_adapter(model, None),
        lambda model, folder: delete_adapter(model, "film"),
        lambda model, folder: load_adapter(model, folder),
        lambda model, folder: disable_adapter(model).__enter__(),
    ],
)
def test_trained_weights_are_never_replaced(model: Any, folders: dict[str, Path], call: Any) -> None:
    """Training on top of an adapter: the base is not recoverable by exchange, so every call keeps the weights."""
    set_adapter(model, "film")
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    before = bits(model)
    with pytest.raises(UserError, match=r"0\.weight was changed .* save what you trained"):
        call(model, folders["law"])
    assert has_bits(model, before)
    assert active_adapter(model) == "film"
    assert set(get_adapters(model)) == set(NAMES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, folder: set_adapter(model, "flim"), "no adapter flim, only film, travel, law: load it"),
        (lambda model, folder: delete_adapter(model, "flim"), "no adapter flim, only film"),
        (lambda model, folder: set_adapter(model, ["film", "law"]), r"\['film', 'law'\].* give one adapter"),
        (lambda model, folder: set_adapter(model, load_adapter(own_model(), folder)), "for another model: load it"),
        (lambda model, folder: load_adapter(model, folder, "film"), "adapter_name=film is in use: give another"),
        (lambda model, folder: load_adapter(model, folder, ""), "adapter_name='' is not allowed"),
        (lambda model, folder: load_adapter(model, folder, revision="v1"), "revision=v1 .* is a folder: leave it out"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(
    model: nn.Module, folders: dict[str, Path], call: Any, message: str
) -> None:
    set_adapter(model, "law")
    with pytest.raises(UserError, match=message):
        call(model, folders["travel"])
    assert active_adapter(model) == "law"
    assert has_bits(model, bits(trained("law")))


def test_a_copy_of_a_model_has_no_adapters(model: nn.Module) -> None:
    """Its weights may be those of an adapter, but nothing could restore its base."""
    assert get_adapters(copy.deepcopy(model)) == {}


def test_a_model_and_its_adapters_are_freed_together(folders: dict[str, Path]) -> None:
    model = own_model()
    adapter = weakref.ref(load_adapter(model, folders["film"], "film"))
    set_adapter(model, "film")
    del model
    gc.collect()
    assert adapter() is None
