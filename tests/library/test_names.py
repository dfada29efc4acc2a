"""Today's names, and the earlier ones that stay accepted: the same result, with one warning at most."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import warnings
from typing import Any

import pytest
import torch
from test_prepare import batches
from toy_bert import ToyBert

import sparsegrad
from sparsegrad import UserError, create_sparsegrad_optimizer, describe, find_mlp, prepare

KINDS = {"up": r".*\.intermediate\.dense", "down": r".*layer\.\d+\.output\.dense"}


def train(model: Any, optimizer: Any) -> list[torch.Tensor]:
    for batch in batches(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize(
    ("earlier", "today", "warned"),
    [
        ({"mlp": KINDS}, {"target_modules": KINDS}, 0),
        ({"steps": 2}, {"calibration_steps": 2}, 1),
        ({"engine": "merged"}, {"engine": "exact"}, 1),
    ],
)
def test_an_earlier_argument_does_the_same(small_bert: ToyBert, earlier: Any, today: Any, warned: int) -> None:
    other, common = copy.deepcopy(small_bert), {"calibration_steps": 2, "keep": 5}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest = {name: value for name, value in common.items() if "steps" not in earlier or name == "keep"}
        mine = train(small_bert, prepare(small_bert, batches(2), **rest, **earlier))
    assert [str(one.message).split(" is now called ")[1].split(";")[0] for one in caught] == [
        f"{name}={value!r}".replace("'", '"') if name == "engine" else f"{name}=" for name, value in today.items()
    ] * warned
    theirs = train(other, prepare(other, batches(2), **{**common, **today}))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_one_argument_under_two_names_is_refused(small_bert: ToyBert) -> None:
    with pytest.raises(UserError, match="mlp= and target_modules="):
        prepare(small_bert, batches(2), mlp=KINDS, target_modules=KINDS)
    with pytest.raises(UserError, match="mlp= and target_modules="):
        find_mlp(small_bert, mlp=KINDS, target_modules=KINDS)


def test_the_earlier_count_of_skipped_steps_warns(small_bert: ToyBert) -> None:
    optimizer = create_sparsegrad_optimizer(small_bert, batches(2), calibration_steps=2)
    with pytest.warns(FutureWarning, match="skipped_steps"):
        assert optimizer.refused_steps == optimizer.skipped_steps == 0


def test_describe_ends_with_the_line_that_peft_prints(small_bert: ToyBert) -> None:
    small_bert.bert.embeddings.requires_grad_(False)
    optimizer = prepare(small_bert, batches(2), keep=5, calibration_steps=2)
    size = sum(parameter.numel() for parameter in small_bert.parameters())
    mlp = sum(linear.weight.numel() for found in find_mlp(small_bert).values() for linear in found.values())
    rest = size - mlp - sum(parameter.numel() for parameter in small_bert.bert.embeddings.parameters())
    *_, shares, total = str(describe(optimizer)).splitlines()
    assert shares == f"target weights: 20 of {mlp:,} ({20 / mlp:.2%}); rest: {rest:,} of {size - mlp:,} by AdamW"
    share = 100 * (20 + rest) / size
    assert total == f"trainable params: {20 + rest:,} || all params: {size:,} || trainable%: {share:.4f}"


def test_describe_does_not_count_the_cores_of_engine_fast_with_the_rest(small_bert: ToyBert) -> None:
    linears = find_mlp(small_bert)
    mlp = sum(linear.weight.numel() for found in linears.values() for linear in found.values())
    rest = sum(parameter.numel() for parameter in small_bert.parameters()) - mlp
    optimizer = prepare(small_bert, batches(2), calibration_steps=2, engine="fast")
    assert f"rest: {rest:,} of {rest:,} by AdamW" in str(describe(optimizer))


def test_every_public_name_is_there() -> None:
    assert all(hasattr(sparsegrad, name) for name in sparsegrad.__all__)
    assert {"BlockLinear", "LeanLinear", "load_bases", "save_bases", "set_adapter", "prepare"} <= set(
        sparsegrad.__all__
    )


def test_the_classes_of_public_results_are_public() -> None:
    """What a public function returns, and the fields of those dataclasses."""
    for public in (getattr(sparsegrad, name) for name in sparsegrad.__all__):
        fields = [one.type for one in dataclasses.fields(public)] if dataclasses.is_dataclass(public) else []
        types = fields if isinstance(public, type) else [public.__annotations__["return"]]
        classes = {getattr(sys.modules[public.__module__], word, None) for word in re.findall(r"\w+", f"{types}")}
        ours = {one.__name__ for one in classes if isinstance(one, type) and one.__module__.startswith("sparsegrad")}
        assert ours <= set(sparsegrad.__all__), public
