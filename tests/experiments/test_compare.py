"""`make compare`: its plans, dry run, bad input, and the way from runs on disk to the table and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evidence_cases import SEEDS, Cases, cases  # noqa: F401

from experiments.compare import __main__ as command
from experiments.compare.forgetting import FOLDER, mean_loss, read_texts
from experiments.compare.table import make_table, write_comparison
from experiments.report.collect import collect_cells
from experiments.report.plans import read_plan as read_stored_plan
from experiments.report.tables.base import Context
from experiments.reproduce.plans import read_plan
from sparsegrad.errors import UserError
from sparsegrad.files import read_json, write_json

RULES: dict[str, Any] = {"regime": "mlp_only", "gate_experiment": "evidence_paper", "reference": "lora_tuned"}
GRID = {"task": "sst2,mrpc", "seed": "42,3705,2023", "method": "lora_tuned,peft/dora,sparsegrad"}


@pytest.fixture(autouse=True)
def _plans_of_the_cases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison reads the plans of `cases`, in tests that have them."""
    if "cases" in request.fixturenames:
        conf = request.getfixturevalue("cases").conf
        monkeypatch.setattr("experiments.compare.block.read_plan", lambda name: read_stored_plan(name, conf))


def fill(made: Cases) -> None:
    """Three methods on two tasks; SparseGrad's runs are those of another plan with the same protocol."""
    made.healthy()
    made.plan("compare", RULES, grid=GRID)
    made.plan("evidence_mlp_only", RULES, grid=GRID)
    trainable = {"mlp": {"trained": 1, "total": 100}}
    for task in ("sst2", "mrpc"):
        for number, seed in enumerate(SEEDS):
            gain = 0.004 * (number - 1)
            more = {"trainable": trainable, "memory": {"train_mib": 300.0}}
            made.run("lora_tuned", task, seed, 0.80 + gain, folder="compare", **more)
            path = made.run("dora", task, seed, 0.84 + gain, folder="compare", **more)
            write_json(path, {**read_json(path), "method": {"merges": False}})
            made.run("sparsegrad", task, seed, 0.88 + gain, folder="evidence_mlp_only", **more)


def test_the_table_is_sorted_by_score_and_counts_equal_runs_of_other_plans(cases: Cases) -> None:  # noqa: F811
    fill(cases)
    context = Context(cases.results, collect_cells(cases.results / "runs"), "mini")
    key = next((cases.results / "runs" / "compare").glob("dora*.json")).stem
    write_json(cases.results / FOLDER / f"{key}.json", {"before": 2.0, "after": 2.5})
    table, points = make_table(context, "compare")
    rows = table.frame.set_index("method")
    assert list(rows.index) == ["SparseGrad exact", "dora", "LoRA, alpha = 2 rank"]
    assert rows.loc["dora", "average"].startswith("84.")
    assert rows.loc["dora", "trainable"] == "1.00 %"
    assert rows.loc["dora", "forgetting"] == "+0.500"
    assert rows.loc["SparseGrad exact", "sst2"].endswith("(3)")
    minus = next(name for name in rows.columns if name.startswith("minus"))
    assert rows.loc["LoRA, alpha = 2 rank", minus] == "reference"
    assert float(rows.loc["SparseGrad exact", minus]) == pytest.approx(8, abs=1)
    assert any("cannot merge them: dora" in note for note in table.notes)
    assert all(interval is not None and interval[0] < value < interval[1] for _, value, interval in points)
    text = write_comparison(cases.results, "compare")
    assert "SparseGrad exact" in text
    assert {path.name for path in (cases.results / "compare").iterdir()} >= {"compare.md", "compare.csv", "compare.png"}


def test_a_comparison_without_runs_says_how_to_make_them(cases: Cases) -> None:  # noqa: F811
    cases.plan("compare", RULES, grid=GRID)
    cases.plan("evidence_paper")
    assert "make compare SCALE=mini" in write_comparison(cases.results, "compare")


def test_the_whole_path_from_searches_to_the_table(
    cases: Cases,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command with stand-ins for what takes hours: searches that leave a summary, runs that leave a record."""
    fill(cases)
    asked: list[Any] = []

    def search(found: Any, workers: int, *, dry: bool) -> int:
        for one in found:
            asked.append(one.study)
            labels = {"model": "minilm", "method": one.plan.base.method.name, "task": one.plan.base.task.name}
            facts = {"study": one.study, "labels": labels, "objective": "heldout", "budget": 8, "train_rest": False}
            best = {"value": 0.5, "values": {"train.lr": 1e-4}}
            counts = {"complete": 8, "pruned": 0}
            more = {"at_edge": False, "best": best, "trials": counts, "seconds": 1.0, "metric": "accuracy"}
            write_json(one.summary, {**facts, **more})
        return 0

    def run(cells: Any, workers: int) -> int:
        asked.extend(cell.label for cell in cells)
        return 0

    monkeypatch.setattr(command.search_all, "make", search)
    monkeypatch.setattr(command.evidence, "make", run)
    given = ["--methods", "peft/dora", "--tasks", "mrpc", f"results_dir={cases.results}"]
    assert command.main(given) == 0
    said = capsys.readouterr().out
    assert asked == ["evidence_mlp_only-minilm-dora-mrpc", *(f"mrpc {seed} peft/dora" for seed in SEEDS)]
    assert "| SparseGrad exact" in said


def test_a_dry_run_lists_searches_and_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dry", "--methods", "peft/dora", "--tasks", "stsb", f"results_dir={tmp_path}"]
    assert command.main(given) == 0
    said = capsys.readouterr().out
    assert "0 of 1 studies complete" in said
    assert "wait for their searches" in said
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "paper"], "SCALE=mini"),
        (["--methods", "peft/magic"], "METHODS=peft/magic"),
        (["--tasks", "rte"], "TASKS=rte"),
        (["--tasks", "oasst1"], "TREES="),
        (["--workers", "0"], "WORKERS=0"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_committed_plan_compares_ten_methods_in_the_protocol_of_the_searches() -> None:
    mine, theirs = read_plan("compare"), read_plan("evidence_mlp_only")
    assert len(mine.params["method"]) >= 10
    assert mine.budget == theirs.budget
    assert set(mine.params["method"]) <= set(command.list_methods())
    assert len(read_plan("compare_smollm2").params["method"]) == 5


def test_the_loss_on_general_text_is_the_mean_over_tokens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path / "texts.json"
    path.write_text('[{"output": "0 1 2 3"}, {"instruction": "x", "output": ""}, {"text": "4 5 6"}]')
    texts = read_texts(path, 10)
    assert texts == ["0 1 2 3", "4 5 6"]
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)

    class Words:
        def __call__(self, text: str, **_: Any) -> Any:
            import torch

            return type("Batch", (), {"input_ids": torch.tensor([[int(word) for word in text.split()]])})

    losses = [mean_loss(model, Words(), [text], 128) for text in texts]
    assert mean_loss(model, Words(), texts, 128) == pytest.approx((3 * losses[0] + 2 * losses[1]) / 5)
    with pytest.raises(UserError, match="JSON"):
        read_texts(tmp_path / "missing.json", 1)
