"""Wrong calls of the public functions: words of other libraries and swapped arguments lead to the right ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import sparsegrad
from sparsegrad import UserError

MODEL = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("function", "word", "message"),
    [
        ("prepare", "learning_rate", "did you mean lr?"),
        ("prepare", "adam_epsilon", "did you mean eps?"),
        ("prepare", "train_dataset", "did you mean batches?"),
        ("prepare", "layers_to_transform", "did you mean target_modules?"),
        ("prepare", "r", "SparseGrad has no rank; density= sets"),
        ("prepare", "rank", "SparseGrad has no rank; density= sets"),
        ("prepare", "lora_alpha", "lr= sets how far a step goes"),
        ("prepare", "max_steps", "leave it to your training loop"),
        ("create_sparsegrad_optimizer", "learning_rate", "did you mean lr?"),
        ("save_lora", "r", "did you mean rank?"),
        ("save_lora", "optimizer", "leave it out"),
        ("save_adapter", "optimiser", "did you mean optimizer?"),
        ("save_adapter", "rank", "save_lora has it"),
        ("load_adapter", "name", "did you mean adapter_name?"),
        ("to_linears", "inplace", "choose from model"),
        ("calibrate", "calibration_steps", "did you mean steps?"),
        ("calibrate", "path", "give what it returns to save_bases"),
        ("find_mlp", "modules", "did you mean target_modules?"),
        ("push_to_hub", "repo", "did you mean repo_id?"),
        ("save_bases", "folder", "choose from path, bases"),
        *((name, "x", "choose from") for name in ("set_adapter", "delete_adapter", "disable_adapter", "describe")),
    ],
)
def test_an_unknown_argument_is_answered_by_the_one_that_is_meant(function: str, word: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"has no argument {word}: .*{re.escape(message)}"):
        getattr(sparsegrad, function)(**{word: 1})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparsegrad.save_adapter("x", MODEL), "model is 'x', .* call save_adapter(model, folder, base, opt"),
        (lambda: sparsegrad.save_lora("x", MODEL, rank=1), "model is 'x', .* call save_lora(model, folder, base, ...)"),
        (lambda: sparsegrad.load_adapter("x", MODEL), "model is 'x', .* call load_adapter(model, folder, adapter_name"),
        (lambda: sparsegrad.load_adapter("x"), "model is 'x', .* call load_adapter(model, folder, adapter_name"),
        (lambda: sparsegrad.set_adapter("film", MODEL), "model is 'film', .* call set_adapter(model, adapter)"),
        (lambda: sparsegrad.set_adapter(MODEL, MODEL), "adapter is a Linear, which is not allowed: give one adapter"),
        (lambda: sparsegrad.delete_adapter("film", MODEL), "call delete_adapter(model, adapter_name)"),
        (lambda: sparsegrad.get_adapters("film"), "call get_adapters(model)"),
        (lambda: sparsegrad.to_linears({}), "a dict, not a torch.nn.Module: call to_linears(model)"),
        (lambda: sparsegrad.save_adapter(MODEL, None), "folder is None, not a path"),
        (lambda: sparsegrad.save_adapter(MODEL, "x", 3), "base is 3, not a model, its folder or hub id, or tensors"),
        (lambda: sparsegrad.save_bases({}, "x"), "path is a dict, not a path: call save_bases(path, bases"),
        (lambda: sparsegrad.push_to_hub(MODEL, "me/x"), "folder is a Linear, not an adapter or its folder"),
        (lambda: sparsegrad.push_to_hub("me/x", "."), "repo_id=. is one: call push_to_hub(folder, repo_id)"),
        (
            lambda: sparsegrad.save_adapter(MODEL),
            "save_adapter needs folder: call save_adapter(model, folder, base, opt",
        ),
        (lambda: sparsegrad.calibrate(steps=3), "calibrate needs model, batches, mlp: call calibrate(model, batches,"),
        (lambda: sparsegrad.prepare(MODEL, [], engine="layer"), "run.py (method.engine=layer) and as the layer sparse"),
    ],
)
def test_wrong_or_swapped_arguments_show_the_order(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message).replace(r"\ \.\*\ ", ".* ")):
        call()


@pytest.mark.parametrize("base", ["./notthere", "/notthere/at/all", Path("notthere")])
def test_a_base_that_is_no_folder_names_the_argument_and_what_it_may_be(base: Any, tmp_path: Path) -> None:
    transformers_like = type("Loadable", (nn.Linear,), {"from_pretrained": None.__class__})
    with pytest.raises(UserError, match=rf"base={base}: there is no such folder; give base= as the folder or hub"):
        sparsegrad.save_adapter(transformers_like(2, 2), tmp_path, base, target_modules={"all": ".*"})


def test_a_renamed_argument_is_reported_at_the_line_of_the_user() -> None:
    with pytest.warns(FutureWarning, match="steps= is now called") as caught, pytest.raises(UserError):
        sparsegrad.prepare(MODEL, [], steps=1)
    assert caught[0].filename == __file__
