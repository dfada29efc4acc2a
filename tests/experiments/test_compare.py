"""`make compare`: its plans, dry run, bad input, and the way from runs on disk to the table and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evidence_cases import SEEDS, Cases, cases  # noqa: F401

from experiments.compare import __main__ as command
from experiments.compare.general_text import mean_loss, read_texts
from experiments.report.collect import collect_cells
from experiments.report.comparison.block import find_shared
from experiments.report.comparison.forgotten import FOLDER
from experiments.report.comparison.notes import PLANS
from experiments.report.comparison.table import make_table, write_comparison
from experiments.report.departures import find_departures
from experiments.report.plans import read_plan as read_stored_plan
from experiments.report.tables.base import Context, Table
from sparsegrad.errors import UserError
from sparsegrad.files import read_json, write_json

RULES: dict[str, Any] = {"regime": "mlp_only", "gate_experiment": "evidence_paper", "reference": "lora_tuned"}
GRID = {"task": "sst2,mrpc", "seed": "42,3705,2023", "method": "lora_tuned,peft/dora,sparsegrad"}


@pytest.fixture(autouse=True)
def _plans_of_the_cases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison reads the plans of `cases`, in tests that have them."""
    if "cases" in request.fixturenames:
        conf = request.getfixturevalue("cases").conf
        monkeypatch.setattr("experiments.report.comparison.block.read_plan", lambda name: read_stored_plan(name, conf))


def fill(made: Cases, rules: dict[str, Any] | None = None, grid: dict[str, str] = GRID) -> None:
    """Three methods on two tasks; SparseGrad's runs are those of another plan with the same protocol."""
    made.healthy()
    made.plan("compare", {**RULES, **(rules or {})}, grid=grid)
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


def show(made: Cases, folder: str = "compare") -> Table:
    """The table of what is on disk."""
    return make_table(Context(made.results, collect_cells(made.results / "runs"), "mini"), folder)[0]


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
    assert rows.loc["dora", "forgetting"] == "+0.500 (1)"
    assert rows.loc["SparseGrad exact", "forgetting"] == "not measured"
    assert rows.loc["SparseGrad exact", "sst2"].endswith("(3)")
    minus = next(name for name in rows.columns if name.startswith("minus"))
    assert rows.loc["LoRA, alpha = 2 rank", minus] == "reference"
    assert float(rows.loc["SparseGrad exact", minus]) == pytest.approx(8, abs=1)
    assert any("cannot merge these into the weights: dora" in note for note in table.notes)
    assert all(one.interval is not None and one.interval[0] < one.value < one.interval[1] for one in points)
    assert [one.label for one in points] == list(rows.index)
    text = write_comparison(cases.results, "compare")
    assert "SparseGrad exact" in text
    written = {path.name for path in (cases.results / "compare").iterdir()}
    assert written >= {"compare.md", "compare.csv", "compare.png", "compare.pdf"}
    for path in (cases.results / "runs" / "evidence_paper").glob("full-*.json"):
        path.unlink()  # so that no gate is reached
    assert "not comparable" in write_comparison(cases.results, "compare")
    assert {path.name for path in (cases.results / "compare").iterdir()} == written - {"compare.png", "compare.pdf"}


def test_a_comparison_without_runs_says_how_to_make_them(cases: Cases) -> None:  # noqa: F811
    cases.plan("compare", RULES, grid=GRID)
    cases.plan("evidence_paper")
    earlier = cases.results / "compare" / "compare.md"
    earlier.parent.mkdir()
    earlier.write_text("a good table")
    assert "make compare SCALE=mini" in write_comparison(cases.results, "compare")
    assert [path.read_text() for path in earlier.parent.iterdir()] == ["a good table"], "an empty one replaces none"


def test_a_run_in_two_plans_counts_once_and_only_where_its_plan_is_as_it_was(cases: Cases) -> None:  # noqa: F811
    """One key is one run: both records agree, and what the command skips is what the table counts."""
    fill(cases)
    again = cases.run("sparsegrad", "sst2", 42, 0.876, folder="compare")
    rows = show(cases).frame.set_index("method")
    assert rows.loc["SparseGrad exact", "sst2"].endswith("(3)")
    cases.plan("compare", {**RULES, "gates": {"sst2": 61, "mrpc": 60}}, grid=GRID)  # the own record is stale now
    assert show(cases).frame.set_index("method").loc["SparseGrad exact", "sst2"].endswith("(3)")
    other = Path("evidence_mlp_only") / again.name
    assert find_shared(cases.results, "compare", again.stem) == other
    (cases.results / "runs" / other).with_suffix(".npz").unlink()
    assert find_shared(cases.results, "compare", again.stem) is None, "without predictions it does not count"
    cases.plan("evidence_mlp_only", {**RULES, "budget": 9}, grid=GRID)
    assert find_shared(cases.results, "compare", "sparsegrad-sst2-3705") is None, "its plan was edited"
    assert "SparseGrad exact" not in set(show(cases).frame["method"])


def test_a_run_of_another_model_is_not_shared(cases: Cases) -> None:  # noqa: F811
    """The departures look at the model, too: its name and what the plan sets of it."""
    cases.plan("compare", RULES, grid=GRID, model={"lora_rank": 47, "usual": {"keep": 5}})
    path = cases.run("sparsegrad", "sst2", 42, 0.8, folder="compare")
    plan = read_stored_plan("compare", cases.conf)
    assert plan is not None
    record = {**read_json(path), "hparams": {"from": "search"}}
    assert find_departures(record, plan) == ["model.lora_rank=None", "model.usual.keep=None"]
    record["config"]["model"] |= {"lora_rank": 47, "usual": {"keep": 5, "density": None}}
    assert find_departures(record, plan) == []


def test_a_method_with_fewer_tasks_is_compared_on_those_and_marked(cases: Cases) -> None:  # noqa: F811
    fill(cases)
    for seed in SEEDS:
        cases.run("hra", "sst2", seed, 0.9, folder="compare")
    table = show(cases)
    rows = table.frame.set_index("method")
    label = "hra (sst2 only)"
    assert list(rows.index)[-1] == label, "below all rows whose averages have more tasks, though its score is higher"
    assert (rows.loc[label, "average"], rows.loc[label, "mrpc"]) == (rows.loc[label, "sst2"], "missing")
    minus = next(name for name in rows.columns if name.startswith("minus"))
    assert float(rows.loc[label, minus]) == pytest.approx(10, abs=1), "over the task that both have"
    assert any(label in note and "cannot be compared" in note for note in table.notes)


def test_the_reference_is_the_planned_one_where_it_has_runs_and_never_the_best(cases: Cases) -> None:  # noqa: F811
    fill(cases)
    folder = cases.results / "runs" / "compare"
    for path in folder.glob("lora_tuned-mrpc-*"):
        path.unlink()
    rows = show(cases).frame.set_index("method")
    minus = next(name for name in rows.columns if name.startswith("minus"))
    assert rows.loc["dora", minus].endswith("(sst2 only)")
    assert rows.loc["LoRA, alpha = 2 rank (sst2 only)", minus] == "reference"
    for path in folder.glob("lora_tuned-*"):
        path.unlink()
    table = show(cases)
    assert list(table.frame["method"]) == ["SparseGrad exact", "dora"]
    assert "minus dora" in table.frame, "the first method of the plan that has runs"
    assert any("METHODS=lora_tuned" in note for note in table.notes)


def test_a_floor_that_predicts_one_class_does_not_void_its_task(cases: Cases) -> None:  # noqa: F811
    fill(cases, {"floors": ["frozen"], "share": 0.02}, {**GRID, "method": GRID["method"] + ",frozen"})
    nothing = {"trainable": {"mlp": {"trained": 0, "total": 100}}}
    for seed in SEEDS:
        cases.run("frozen", "sst2", seed, 0.5, folder="compare", constant=True, **nothing)
    table = show(cases)
    assert any("sst2: ok" in note and "frozen seed 42" in note for note in table.notes)
    assert "head alone (sst2 only)" in set(table.frame["method"])
    assert any("Floors" in note and "head alone" in note for note in table.notes)
    (sizes,) = [note for note in table.notes if "equal sizes" in note]
    assert "dora 1 %" in sizes
    assert "head alone" not in sizes


def test_a_loss_is_called_a_loss(cases: Cases) -> None:  # noqa: F811
    cases.plan("compare_smollm2", {**RULES, "gates": {}}, grid={**GRID, "task": "oasst1"})
    cases.plan("evidence_paper")
    assert "TREES=" in show(cases, "compare_smollm2").frame["method"][0]
    for method, loss in (("lora_tuned", 2.0), ("dora", 1.5)):
        for number, seed in enumerate(SEEDS):
            cases.loss(method, seed, loss + 0.01 * number, folder="compare_smollm2")
    table = show(cases, "compare_smollm2")
    assert list(table.frame["method"]) == ["dora", "LoRA, alpha = 2 rank"], "the lowest loss first"
    said = " ".join([table.title, *table.notes])
    assert "SmolLM2" in table.title
    assert "lower is better" in said
    assert "points" not in said
    assert "head alone" not in said
    assert "h to target" not in table.frame
    assert "(lower is better)" in PLANS["compare_smollm2"].score


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

    def run(cells: Any, workers: int) -> Any:
        asked.extend(cell.label for cell in cells)
        return command.making.Outcome(complete=3, planned=3, done=3, failed={})

    monkeypatch.setattr(command.search_all, "make", search)
    monkeypatch.setattr(command.making, "make_cells", run)
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
    assert "3 of 3 cells wait for 1 search, which" in said
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
