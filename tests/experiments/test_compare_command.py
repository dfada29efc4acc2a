"""`make compare`: which searches count, what a dry run lists, and what one method that fails does to the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from experiments.compare import __main__ as command
from experiments.compare.methods import find_method
from experiments.reproduce import search_all
from experiments.reproduce.cells import list_cells
from experiments.reproduce.plans import read_plan
from experiments.reproduce.searches import Search
from sparsegrad.errors import UserError
from sparsegrad.files import read_json, write_json
from sparsegrad.runs.plan import plan_hash
from sparsegrad.sweeps.ledger import REASON
from sparsegrad.sweeps.show import export
from sparsegrad.sweeps.study import open_study

SHIRA = "method.config.peft_type=SHIRA"


@pytest.fixture
def where(tmp_path: Path) -> str:
    return f"results_dir={tmp_path / 'results'}"


def plan(method: str, where: str, *overrides: str) -> Search:
    return search_all.plan_search(read_plan("compare"), method, "mrpc", None, (where, *overrides))


def store(search: Search, state: TrialState) -> optuna.Study:
    """A study whose trials of the whole budget ended in this state."""
    study = open_study(search.plan).study
    for number in range(search.plan.budget):
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=0.5 if state == TrialState.COMPLETE else None,
                params={"train.lr": 1e-4 * (number + 1)},
                distributions=search.plan.distributions,
                user_attrs={REASON: "training diverged"} if state == TrialState.PRUNED else {},
            )
        )
    return study


def finish(search: Search) -> dict[str, Any]:
    return export(store(search, TrialState.COMPLETE), search.summary.parent)


@pytest.mark.parametrize("kept", ["study", "summary", "earlier summary"])
def test_a_search_is_not_used_for_other_settings_of_the_method(
    kept: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = plan("peft", where)
    summary = finish(search)
    assert summary["method"]["config.peft_type"] == "LORA"
    if kept == "study":
        search.summary.unlink()
    else:
        (tmp_path / "results" / "studies" / "studies.db").unlink()
    if kept == "earlier summary":
        write_json(search.summary, {key: value for key, value in summary.items() if key != "method"})
    assert plan("peft", where).is_finished, "with its own settings, it is found"
    assert plan("peft", where, "method.config.peft_type=LORA").is_finished, "a default may be given"
    assert command.main(["--methods", "peft", "--tasks", "mrpc", where, SHIRA]) == 2
    error = capsys.readouterr().err
    assert "evidence_mlp_only-minilm-peft-mrpc was made with method.config.peft_type=LORA, not SHIRA" in error
    assert "name: NAME" in error
    assert "sweep.overwrite=true" in error
    assert error.count("\n") == 1
    assert plan("peft", where, SHIRA, "sweep.overwrite=true").plan.sweep.overwrite
    if kept == "study":
        return
    run = ["method=peft", "task=mrpc", "seed=42", where]
    assert list_cells("compare", run)[0].config.train.lr == 1e-4
    with pytest.raises(UserError, match=r"(?s)peft-mrpc was searched with .*not .*SHIRA.*conf/method/NAME\.yaml"):
        list_cells("compare", [*run, SHIRA])


def test_a_search_is_found_by_runs_of_another_seed_and_of_plans_that_borrow_its_rate(where: str) -> None:
    for method in ("peft/shira", "sparsegrad"):  # shira draws its entries by the seed
        summary = finish(plan(method, where))
        assert summary["seed"] == 7
    assert list_cells("compare", ["method=peft/shira", "task=mrpc", "seed=42", where])[0].config.seed == 42
    name = "evidence_mlp_only-minilm-sparsegrad-stsb"
    labels = {"model": "minilm", "method": "sparsegrad", "task": "stsb"}
    path = Path(where.partition("=")[2]) / "studies" / name / "summary.json"
    write_json(path, {**summary, "study": name, "labels": labels})
    for borrowing in ("evidence_density", "evidence_basis"):
        cells = list_cells(borrowing, ["task=stsb", "seed=42", where])
        assert {cell.config.train.lr for cell in cells} == {1e-4}


def test_a_finished_search_is_made_anew_only_if_asked(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(plan("frozen", where))
    started: list[Any] = []

    def run(jobs: Any, *_: Any) -> Any:
        started.extend(job for job in jobs if not jobs[job].is_finished)
        yield from ()

    monkeypatch.setattr(search_all, "run_jobs", run)
    assert search_all.make([plan("frozen", where)], 1, dry=False) == 0
    assert not started
    anew = plan("frozen", where, "sweep.overwrite=true")
    assert search_all.make([anew], 1, dry=False) == 1
    assert not anew.summary.exists()
    (job,) = started
    assert not any("overwrite" in word for word in job.command), "a second worker would delete the study of the first"


def test_an_unfinished_summary_is_exported_again(where: str) -> None:
    search = plan("frozen", where)
    summary = finish(search)
    write_json(search.summary, {**summary, "trials": {**summary["trials"], "complete": 3}})
    with pytest.raises(UserError, match="has 3 of 8 trials: make compare SCALE=mini METHODS=frozen TASKS=mrpc"):
        list_cells("compare", ["method=frozen", "task=mrpc", "seed=42", where])
    search_all.export_finished(search)
    assert read_json(search.summary)["trials"]["complete"] == 8


def test_a_method_whose_trials_all_diverged_does_not_stop_the_others(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(plan("frozen", where), TrialState.PRUNED)
    finish(plan("bitfit", where))
    made: list[str] = []
    monkeypatch.setattr(command.evidence, "make", lambda cells, workers: made.extend(one.label for one in cells) or 0)
    monkeypatch.setattr(command, "write_comparison", lambda *_: "the table")
    assert command.main(["--methods", "frozen,bitfit", "--tasks", "mrpc", "seed=42", where]) == 1
    said = capsys.readouterr().out
    assert "frozen-mrpc: none of its 8 trials was completed (training diverged)" in said
    assert "left out: frozen on mrpc" in said
    assert made == ["mrpc 42 bitfit"]
    assert "the table" in said


def test_a_dry_run_lists_the_runs_that_wait_with_their_hours(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    finish(plan("bitfit", where))
    given = ["--methods", "frozen,bitfit", "--tasks", "mrpc", "seed=42,3705", where]
    assert command.main([*given, "--dry"]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 studies complete" in said
    assert "2 cells wait for their searches" in said
    assert "0 of 4 cells complete" in said
    assert "hours left" in said
    assert command.main([*given, "--dry", "protocol.epochs=0"]) == 2, "a wrong value does not count as waiting"
    assert "protocol.epochs=0" in capsys.readouterr().err


def test_a_shared_run_counts_only_under_its_plan_as_it_is_now(where: str) -> None:
    (cell,) = list_cells("compare", ["method=lora_tuned", "task=stsb", "seed=42", "hparams=null", where])
    folder = Path(cell.config.results_dir) / "runs" / "evidence_mlp_only"
    record = {"schema": 1, "status": "complete", "config": cell.config.resolved}
    for sha256, expected in (("old", False), (plan_hash(command.CONF / "experiment" / "evidence_mlp_only.yaml"), True)):
        write_json(folder / f"{cell.config.key}.json", {**record, "plan": {"sha256": sha256}})
        assert command.is_shared(cell) is expected


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
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(command, "write_comparison", lambda _, folder: written.append(folder) or "")
    request = command.Request(methods=(), tasks=(), data=None, trees=None, workers=1, dry=False, overrides=(where,))
    assert command.compare("compare_smollm2", request) == 0
    assert written == []
    write_json(request.results / "runs" / "evidence_smollm2" / "0.json", {})
    assert command.compare("compare_smollm2", request) == 0
    assert written == ["compare_smollm2"]
    assert "TREES=" in capsys.readouterr().out
