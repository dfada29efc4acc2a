"""The pages of docs/ do what they say: their blocks run as they stand; and the reason against a peft method holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
    """The Python blocks of a page that say nothing else: a fragment begins with the comment `# fragment`."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for block in found if not block.startswith("# fragment")]


def run_blocks(page: str, chosen: Iterable[str]) -> dict[str, Any]:
    """The names that the blocks leave; they get none but their own."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in chosen:
        exec(compile(block, page, "exec"), names)
    return names


PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
    if page.name != "recipes.md" and blocks(page.relative_to(ROOT).as_posix())
]
NEEDED = {"asset_path": "minilm", "experiments.mtbench": "mtbench"}  # a word of a block -> the asset that it needs
RECIPES = "docs/recipes.md"


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; assets and the committed results are found as in the checkout."""
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(assets_root().resolve()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_from_top_to_bottom(
    page: str, work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = blocks(page)
    for word, asset in NEEDED.items():
        if any(word in block for block in chosen) and problem(ASSETS[asset], assets_root()):
            pytest.skip(f"needs `python -m sparsegrad.assets {asset}`")
    run_blocks(page, chosen)
    if page == "README.md":
        check_output(capsys.readouterr().out)


def check_output(printed: str) -> None:
    """README shows what its block prints, up to the rounding of another machine."""
    shown = re.findall(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    number = re.compile(r"\d[\d,]*\.?\d*")
    assert number.sub("N", printed) == number.sub("N", shown)
    values = [[float(one.replace(",", "")) for one in number.findall(text)] for text in (printed, shown)]
    assert values[0] == pytest.approx(values[1], rel=0.02, abs=0.02)


@pytest.mark.parametrize("number", range(1, len(blocks(RECIPES))))
def test_every_recipe_runs_after_the_first_block_and_its_optimizer_trains(number: int, work_folder: Path) -> None:
    setup, recipe = blocks(RECIPES)[0], blocks(RECIPES)[number]
    if "lightning" in recipe:
        pytest.importorskip("lightning")
    assert describe(run_blocks(RECIPES, [setup, recipe])["optimizer"]).taken


def test_the_recipes_run_from_top_to_bottom(work_folder: Path) -> None:
    """As a reader does; each of them changes its model, which the next one must not find."""
    chosen = [block for block in blocks(RECIPES) if "import lightning" not in block]
    assert describe(run_blocks(RECIPES, chosen)["optimizer"]).taken


def test_every_page_is_in_the_navigation_and_every_page_of_it_exists() -> None:
    listed = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


LINKS = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *DOCS.glob("*.md")], ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page: Path) -> None:
    """From docs/ to docs/ alone: the site that is built of it has nothing else."""
    for link in LINKS.findall(page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert page.parent == ROOT or target.is_relative_to(DOCS), f"{link} leads out of docs/"
        assert not anchor or anchor in anchors(target), link


def test_no_page_installs_the_other_sparsegrad() -> None:
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "sparsegrad").rglob("*.py")]
    wrong = [page for page in pages if re.search(r"pip install '?sparsegrad(?!-peft)\b.*\[", page.read_text())]
    assert wrong == []


Rows = list[dict[str, torch.Tensor]]


def train_with_trainer(model: Any, rows: Rows, optimizer: Any) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir="out", max_steps=3, per_device_train_batch_size=4, lr_scheduler_type="constant", max_grad_norm=0.0,
        report_to="none", use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()


def train_with_accelerate(model: Any, rows: Rows, optimizer: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    wrapped, stepped, loader = accelerator.prepare(model, optimizer, loader)
    for batch in [*loader] * 3:
        accelerator.backward(wrapped(**batch).loss)
        stepped.step()
        stepped.zero_grad()


def train_with_lightning(model: Any, rows: Rows, optimizer: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return optimizer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    loader = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    lightning.Trainer(max_steps=3, accelerator="cpu", enable_model_summary=False, **quiet).fit(Classifier(), loader)


@pytest.mark.parametrize("train", [train_with_trainer, train_with_accelerate, train_with_lightning])
def test_a_framework_walks_the_path_of_a_plain_loop(train: Any, work_folder: Path) -> None:
    """One batch again and again, constant rate, no clipping, no dropout: the same weights."""
    batch = tiny_batches("bert", 1)[0]
    rows = [{name: values[row] for name, values in batch.items()} for row in range(4)]
    plain, trained = (without_dropout(tiny_model("bert", torch.float32)) for _ in range(2))
    optimizer, other = (
        prepare(model, [batch] * 2, calibration_steps=2, lr=1e-3, density=0.1) for model in (plain, trained)
    )
    for _ in range(3):
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train(trained, rows, other)
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
