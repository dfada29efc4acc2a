"""`make compare`: what a dry run lists, and what one method that fails does to the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evidence_cases import SEEDS, Cases, cases  # noqa: F401
from optuna.trial import TrialState
from search_cases import finish, plan, store
from search_cases import results as results  # the fixtures
from search_cases import where as where

from experiments.compare import __main__ as command
from experiments.compare.methods import find_method
from experiments.report.collect import collect_cells
from experiments.report.command import write_comparisons
from experiments.report.plans import read_plan as read_stored_plan
from experiments.report.tables.base import Context
from experiments.reproduce.cells import Cell, list_cells
from experiments.reproduce.making import Outcome
from experiments.reproduce.plans import read_plan
from sparsegrad.errors import UserError
from sparsegrad.files import write_json

SHIRA = "method.config.peft_type=SHIRA"


def test_a_method_whose_trials_all_diverged_does_not_stop_the_others(
    where: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(plan("frozen", *where), TrialState.PRUNED)
    finish(plan("bitfit", *where))
    made: list[str] = []

    def make(cells: list[Cell], _: int) -> Outcome:
        made.extend(one.label for one in cells)
        return Outcome(complete=0, planned=1, done=0, failed={"the run": "it diverged"})

    monkeypatch.setattr(command.making, "make_cells", make)
    monkeypatch.setattr(command, "write_comparison", lambda *_: "the table")
    given = ["--methods", "frozen,bitfit", "--tasks", "mrpc", "--data", str(tmp_path), *where]
    assert command.main([*given, "seed=42,3705", "--dry"]) == 0
    shown = capsys.readouterr()
    said = shown.out
    assert "2 of 4 cells wait for 1 search, which the same command makes first" in said
    assert "will not count" not in said, "their rate is not known, rather than set by hand"
    assert f"DATA={tmp_path} has no mrpc" in shown.err
    assert "0 of 4 cells complete" in said
    assert "hours left" in said, "of those that wait, too"
    assert not made

    (tmp_path / "mrpc").mkdir()
    assert command.main([*given, "seed=42"]) == 1
    said = capsys.readouterr().out
    anew = f'make compare SCALE=mini DATA={tmp_path} METHODS=frozen TASKS=mrpc ARGS="{" ".join(where)} sweep.overwrite'
    assert "frozen-mrpc: none of its 1 trials was completed (training diverged)" in said
    assert f"make it anew with {anew}" in said
    assert made == ["mrpc 42 bitfit"]
    last = said[said.index("the table") :].splitlines()
    assert last[:3] == ["the table", "0 of 1 cells complete, 0 of them by this call", last[2]]
    assert last[2].startswith("failed: the run: it diverged")
    assert last[3].startswith("left out: frozen on mrpc: no trial of its search was completed")
    assert anew in last[3]
    assert len(last) == 4


@pytest.mark.parametrize("is_edited", [False, True])
def test_a_run_of_any_method_is_made_again_without_its_predictions_and_named_if_the_plan_was_edited(
    is_edited: bool, where: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(plan("peft", *where))  # a method that the plan does not list
    (cell,) = list_cells("compare", ["method=peft", "task=mrpc", "seed=42", *where])
    before = {"experiment": "compare", "sha256": "0" * 16 if is_edited else read_plan("compare").sha256}
    record = {
        "schema": 1,
        "status": "complete",
        "plan": before,
        "config": cell.config.resolved,
        "hparams": cell.hparams,
    }
    write_json(cell.config.record_path, record)
    made: list[bool] = []

    def make(cells: list[Cell], _: int) -> Outcome:
        made.extend(one.uncounted is not None for one in cells)
        return Outcome(complete=1, planned=1, done=1, failed={})

    monkeypatch.setattr(command.making, "make_cells", make)
    monkeypatch.setattr(command, "write_comparison", lambda *_: "the table")
    assert command.main(["--methods", "peft", "--tasks", "mrpc", "seed=42", *where]) == 0
    assert made == [not is_edited]
    reason = "its plan compare was edited afterwards" if is_edited else "the command that made it makes it again"
    assert reason in capsys.readouterr().out


def test_a_wrong_value_does_not_count_as_waiting(where: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--dry", "--methods", "bitfit", "--tasks", "mrpc", *where, "protocol.epochs=0"]) == 2
    assert "protocol.epochs=0" in capsys.readouterr().err


def test_a_method_is_found_by_the_name_in_messages_and_tables() -> None:
    assert find_method("dora") == find_method("peft/dora") == "peft/dora"
    assert find_method("peft") == "peft"
    with pytest.raises(UserError, match="METHODS=dorra"):
        find_method("dorra")


@pytest.mark.parametrize(
    ("methods", "names", "message"),
    [
        (["peft/mine"], ["peft"], "METHODS=peft/mine has name: peft.*name: mine"),
        (["lora", "peft/lora"], ["lora", "lora"], "METHODS=lora,peft/lora have the same name"),
    ],
)
def test_methods_of_one_name_are_refused(methods: list[str], names: list[str], message: str) -> None:
    found: Any = [
        SimpleNamespace(plan=SimpleNamespace(base=SimpleNamespace(method=SimpleNamespace(name=name)))) for name in names
    ]
    with pytest.raises(UserError, match=message):
        command._check_names(methods, found)


@pytest.mark.parametrize("override", ["method=lora", "task=cola", "experiment=table4"])
def test_arguments_that_choose_are_not_overridden(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([override]) == 2
    assert f"ARGS={override} is not allowed" in capsys.readouterr().err


def test_without_trees_the_table_of_existing_runs_is_rebuilt(
    where: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(command, "write_comparison", lambda _, folder: written.append(folder) or "")
    request = command.Request(methods=(), tasks=(), data=None, trees=None, workers=1, dry=False, overrides=where)
    assert command.compare("compare_smollm2", request).status == 0
    assert written == []
    write_json(request.results / "runs" / "evidence_smollm2" / "0.json", {})
    assert command.compare("compare_smollm2", request).status == 0
    assert written == ["compare_smollm2"]
    assert "TREES=" in capsys.readouterr().out


def test_a_report_of_everything_has_the_comparisons_that_have_runs(
    cases: Cases,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "experiments.report.comparison.block.read_plan", lambda name: read_stored_plan(name, cases.conf)
    )
    cases.healthy()
    rules = {"regime": "mlp_only", "gate_experiment": "evidence_paper", "reference": "lora_tuned"}
    grid = {"task": "mrpc", "seed": "42,3705,2023", "method": "lora_tuned,peft/dora"}
    for name in command.COMPARED:
        cases.plan(name, rules, grid=grid)
    for seed in SEEDS:
        for method, accuracy in (("lora_tuned", 0.8), ("dora", 0.84)):
            cases.run(method, "mrpc", seed, accuracy, folder="compare")
    context = Context(cases.results, collect_cells(cases.results / "runs"), "mini")
    tables, figures = write_comparisons(context)
    assert [table.name for table in tables] == ["compare"]
    assert [path.name for path in figures.values()] == ["compare.png"]
    assert {path.suffix for path in (cases.results / "compare").iterdir()} >= {".md", ".csv", ".png"}
