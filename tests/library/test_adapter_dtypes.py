"""An adapter of weights that trained in float32, on a base in 16 bits: merging widens what it changes, exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_checks import Prepared, changed, own_model, stored
from model_states import bits, has_bits
from torch import Tensor, nn

from sparsegrad import UserError, load_adapter, save_adapter, set_adapter
from sparsegrad.adapter.format import FACTS
from sparsegrad.adapter.merge import Patch

HALVES = [torch.bfloat16, torch.float16]


def rounded(dtype: torch.dtype) -> nn.Sequential:
    return own_model().to(dtype)


def save(folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Save a model that trained in float32 from weights that were rounded to `dtype`."""
    base = rounded(dtype).float()
    model = changed(base)
    save_adapter(model, folder, base, Prepared(model[0].weight))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("dtype", HALVES)
def test_a_base_of_16_bits_is_widened_and_comes_back(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, fresh = save(tmp_path, dtype), rounded(dtype)
    assert {one["form"] for one in stored(tmp_path).values()} == {"sparse", "whole"}
    parameters = list(fresh.parameters())
    adapter = load_adapter(fresh, tmp_path)
    assert f"4 tensors of the model are {dtype} and become torch.float32" in caplog.text
    for _ in range(2):
        adapter.merge()
        assert has_bits(fresh, bits(model))
        fresh(torch.zeros(2, 40))
        adapter.unmerge()
        assert has_bits(fresh, bits(rounded(dtype)))
    assert all(one is two for one, two in zip(parameters, fresh.parameters(), strict=True)), "so tied ones stay tied"


def test_two_adapters_of_a_narrow_base_take_turns(tmp_path: Path) -> None:
    model, fresh = save(tmp_path / "one"), rounded(torch.bfloat16)
    other = changed(rounded(torch.bfloat16))
    save_adapter(other, tmp_path / "two", rounded(torch.bfloat16), target_modules={"only": "0"})
    one, two = (load_adapter(fresh, tmp_path / name) for name in ("one", "two"))
    for adapter, expected in ((one, model), (two, other), (one, model), (None, rounded(torch.bfloat16))):
        set_adapter(fresh, adapter)
        assert has_bits(fresh, bits(expected))


@pytest.mark.parametrize("merged", [False, True])
def test_an_exchange_that_fails_halfway_leaves_dtypes_and_values(
    merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    fresh = rounded(torch.bfloat16)
    adapter = load_adapter(fresh, tmp_path)
    if merged:
        adapter.merge()
    before, swap, calls = copy.deepcopy(fresh), Patch.swap, [0]

    def fail(patch: Patch, target: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        swap(patch, target)

    move: Callable[[], None] = adapter.unmerge if merged else adapter.merge
    with monkeypatch.context() as within:
        within.setattr(Patch, "swap", fail)
        with pytest.raises(KeyboardInterrupt):
            move()
    assert adapter.merged == merged
    assert has_bits(fresh, bits(before))
    move()


def test_a_base_that_was_not_rounded_is_refused_with_its_dtype(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(UserError, match=r"0\.weight was rounded to torch\.bfloat16 .* with dtype=torch\.bfloat16"):
        load_adapter(own_model(), tmp_path)
    with pytest.raises(UserError, match=r"0\.weight is .* torch\.float16 in the model and .*float32 in the adapter"):
        load_adapter(rounded(torch.float16), tmp_path)
    load_adapter(rounded(torch.bfloat16).float(), tmp_path)


def test_the_card_names_the_dtype_of_the_base(tmp_path: Path) -> None:
    save(tmp_path / "rounded")
    assert "load it with `dtype=torch.bfloat16`" in (tmp_path / "rounded" / "README.md").read_text()
    save_adapter(changed(own_model()), tmp_path / "plain", own_model(), target_modules={"only": "0"})
    assert "dtype" not in (tmp_path / "plain" / "README.md").read_text()


def test_without_a_hash_another_dtype_is_refused(tmp_path: Path) -> None:
    """As in adapters of earlier versions in which no target weight changed: the base may be any."""
    base = rounded(torch.bfloat16).float()
    model = copy.deepcopy(base)
    with torch.no_grad():
        model[1].bias += 1
    save_adapter(model, tmp_path, base, target_modules={"only": "0"})
    load_adapter(rounded(torch.bfloat16), tmp_path)
    facts = json.loads((tmp_path / FACTS).read_text())
    del facts["stayed"]
    (tmp_path / FACTS).write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"1\.bias is .* torch\.bfloat16 in the model"):
        load_adapter(rounded(torch.bfloat16), tmp_path)
    load_adapter(base, tmp_path)
