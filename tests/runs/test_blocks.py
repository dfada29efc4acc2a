"""Which blocks and kinds of a model are fine-tuned."""

from __future__ import annotations

from typing import Any

import pytest
from llama_fixtures import tiny_llama
from torch import nn

from sparsegrad.errors import UserError
from sparsegrad.models.layer_choice import block_indices, check_blocks, dense_weights, select_linears
from sparsegrad.targets import find_mlp


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [(None, [0, 1, 2, 3, 4, 5]), ("0::3", [0, 3]), ("1:4", [1, 2, 3]), ("::", list(range(6))), ([5, 2], [2, 5])],
)
def test_lists_and_slices(blocks: Any, chosen: list[int]) -> None:
    assert block_indices(blocks, 6) == chosen


def test_the_papers_blocks_are_eleven_of_32() -> None:
    assert block_indices("0::3", 32) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30]


@pytest.mark.parametrize("blocks", [[6], [0, 99], "6:", "3:3"])
def test_beyond_the_model(blocks: Any) -> None:
    with pytest.raises(UserError, match=r"model\.blocks=.*6 blocks, 0 to 5"):
        block_indices(blocks, 6)


@pytest.mark.parametrize("blocks", ["every third", "0::0", "::-1", [], [-1], [1, 1], ["1"], 3])
def test_neither_list_nor_slice(blocks: Any) -> None:
    with pytest.raises(UserError, match=r"model\.blocks=.*is not allowed"):
        check_blocks(blocks)


def test_kinds_and_blocks_of_a_llama() -> None:
    found = find_mlp(tiny_llama())
    assert {kind: len(linears) for kind, linears in found.items()} == {"gate": 4, "up": 4, "down": 4}
    chosen = select_linears(found, ["up", "down"], "0::3")
    assert list(chosen["up"]) == ["model.layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj"]
    assert set(chosen) == {"up", "down"}
    dense = dense_weights(found, ["gate"], "0::3", chosen)
    assert dense == {"model.layers.0.mlp.gate_proj.weight", "model.layers.3.mlp.gate_proj.weight"}


@pytest.mark.parametrize(("kinds", "dense"), [(["middle"], None), ("up", None), (["up"], ["up"]), (["up"], ["none"])])
def test_kinds_that_do_not_fit(kinds: Any, dense: Any) -> None:
    found = find_mlp(tiny_llama())
    with pytest.raises(UserError, match=r"model\.(kinds|dense)="):
        dense_weights(found, dense, None, select_linears(found, kinds, None))


def test_all_is_all() -> None:
    found = find_mlp(tiny_llama())
    assert select_linears(found, None, None) is found


def test_modules_without_an_index_are_chosen_by_kind_only() -> None:
    found = {kind: {f"ffn.{kind}": nn.Linear(4, 4)} for kind in ("up", "down")}
    assert list(select_linears(found, ["up"], None)) == ["up"]
    with pytest.raises(
        UserError, match=r"model\.blocks=0::2 .*ffn\.up has no block index .*model\.mlp={kind: pattern}"
    ):
        select_linears(found, ["up"], "0::2")
