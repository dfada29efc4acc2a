"""The pages of docs/ do what they say: their blocks run as they stand; and the reason against a peft method holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny_batches, tiny_model
from peft.utils import register_peft_method
from run_fixtures import ROOT

from sparsegrad import describe, prepare
from sparsegrad.assets.download import assets_root, problem
from sparsegrad.assets.table import ASSETS
from sparsegrad.targets import LAYOUTS

DOCS = ROOT / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def execute(block: str, names: dict[str, Any], page: str) -> None:
    exec(compile(block, page, "exec"), names)


@pytest.mark.skipif(bool(problem(ASSETS["minilm"], assets_root())), reason="needs `make assets`")
def test_the_tutorial_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(assets_root().resolve()))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks("tutorial.md"):
        execute(block, names, "tutorial.md")
    assert (tmp_path / "film-adapter" / "README.md").is_file()
    assert len(names["losses"]) == 4


def recipe_names() -> dict[str, Any]:
    """What the recipes take for given, small."""
    model, batches = tiny_model("bert", torch.float32), tiny_batches("bert", 4)
    rows = [{name: values[row] for name, values in batch.items()} for batch in batches for row in range(4)]
    vit, images = tiny_model("vit", torch.float32), tiny_batches("vit", 4)
    return {
        "model": model,
        "batches": batches,
        "dataset": rows,
        "loader": torch.utils.data.DataLoader(rows, batch_size=4),
        "llama": tiny_model("llama", torch.float32),
        "text_batches": tiny_batches("llama", 4),
        "vit": vit,
        "image_batches": [{**batch, "pixel_values": batch["pixel_values"].float()} for batch in images],
    }


@pytest.mark.parametrize("number", range(len(blocks("recipes.md"))))
def test_every_recipe_runs_and_its_optimizer_trains(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = recipe_names()
    execute(blocks("recipes.md")[number], names, "recipes.md")
    assert describe(names["optimizer"]).taken


def test_the_trainer_walks_the_path_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch again and again, constant rate, no clipping, no dropout: the same weights."""
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)
    rows = recipe_names()["dataset"][:4]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    plain, trained = (without_dropout(tiny_model("bert", torch.float32)) for _ in range(2))
    optimizer, other = (
        prepare(model, [batch] * 2, calibration_steps=2, lr=1e-3, density=0.1) for model in (plain, trained)
    )
    for _ in range(3):
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    arguments = TrainingArguments(
        output_dir="out", max_steps=3, per_device_train_batch_size=4, lr_scheduler_type="constant", max_grad_norm=0.0,
        report_to="none", use_cpu=True,
    )  # fmt: skip
    Trainer(model=trained, args=arguments, train_dataset=rows, optimizers=(other, None)).train()
    before = tiny_model("bert", torch.float32).state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.allclose(weight, trained.state_dict()[name], atol=1e-6), name
    for name in describe(optimizer).taken[0].names:
        assert not torch.equal(plain.state_dict()[name], before[name])


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_the_start_page_lists_every_layout_once() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert len({tuple(LAYOUTS[name].values()) for name in listed}) == len(listed)
    assert {tuple(LAYOUTS[name].values()) for name in listed} == {tuple(layout.values()) for layout in LAYOUTS.values()}


def test_peft_takes_no_method_from_outside() -> None:
    """docs/from-lora.md says so; when this fails, look into it again."""
    with pytest.raises(ValueError, match="Unknown PEFT type SPARSEGRAD"):
        register_peft_method(name="sparsegrad", config_cls=object, model_cls=None)


def test_the_notebook_has_outputs_and_no_place_of_a_machine() -> None:
    import json

    notebook = json.loads((DOCS / "tutorial.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not re.search(r"/(tmp|home|work|root|usr|Users)/", json.dumps(outputs))
