"""`make compare`: which searches count, what a dry run lists, and what one method that fails does to the others."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from evidence_cases import SEEDS, Cases, cases  # noqa: F401
from optuna.trial import TrialState

from experiments.compare import __main__ as command
from experiments.compare.methods import find_method
from experiments.report.collect import collect_cells
from experiments.report.command import write_comparisons
from experiments.report.plans import read_plan as read_stored_plan
from experiments.report.tables.base import Context
from experiments.reproduce import search_all, searches
from experiments.reproduce.cells import list_cells
from experiments.reproduce.plans import read_plan
from experiments.reproduce.searches import Search
from sparsegrad.errors import ResourceError, UserError
from sparsegrad.files import read_json, write_json
from sparsegrad.sweeps.ledger import REASON
from sparsegrad.sweeps.search_results import SearchMissingError
from sparsegrad.sweeps.show import export
from sparsegrad.sweeps.study import open_study

SHIRA = "method.config.peft_type=SHIRA"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def where(results: Path) -> tuple[str, str]:
    """A results folder of its own, and searches of one trial."""
    return f"results_dir={results}", "evidence.budget=1"


def plan(method: str, *overrides: str) -> Search:
    return search_all.plan_search(read_plan("compare"), method, "mrpc", None, overrides)


def store(search: Search, state: TrialState) -> optuna.Study:
    """A study whose only trial ended in this state."""
    study, is_complete = open_study(search.plan).study, state == TrialState.COMPLETE
    trial = optuna.trial.create_trial(
        state=state,
        value=0.5 if is_complete else None,
        params={"train.lr": 1e-4},
        distributions=search.plan.distributions,
        user_attrs={} if is_complete else {REASON: "training diverged"},
    )
    study.add_trial(trial)
    return study


def finish(search: Search) -> dict[str, Any]:
    return export(store(search, TrialState.COMPLETE), search.summary.parent)


def test_a_search_is_not_used_for_other_settings_of_the_method(
    where: tuple[str, str], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = plan("peft", *where)
    summary = finish(search)
    assert summary["method"]["config.peft_type"] == "LORA"
    search.summary.unlink()
    assert command.main(["--methods", "peft", "--tasks", "mrpc", *where, SHIRA]) == 2, "the study tells"
    error = capsys.readouterr().err
    assert "evidence_mlp_only-minilm-peft-mrpc was made with method.config.peft_type=LORA, not SHIRA" in error
    assert "name: NAME" in error
    assert f'METHODS=peft TASKS=mrpc ARGS="{" ".join(where)} {SHIRA} sweep.overwrite=true"' in error
    assert error.count("\n") == 1

    (results / "studies" / "studies.db").unlink()
    run = ["method=peft", "task=mrpc", "seed=42", *where]
    earlier = {key: value for key, value in summary.items() if key != "method"}  # before summaries listed settings
    for content in (summary, earlier):
        write_json(search.summary, content)
        with pytest.raises(UserError, match=r"was made with .*LORA, not SHIRA"):
            plan("peft", *where, SHIRA)
        assert list_cells("compare", run)[0].config.train.lr == 1e-4
        with pytest.raises(UserError, match=r"(?s)peft-mrpc was searched with .*not .*SHIRA.*conf/method/NAME\.yaml"):
            list_cells("compare", [*run, SHIRA])
    assert plan("peft", *where, "method.config.peft_type=LORA").is_finished, "a default may be given"


def test_a_search_is_not_used_for_other_training(where: tuple[str, str], results: Path) -> None:
    """A plan that is edited after its searches would take their rates, found in another order of batches."""
    search, other = plan("lora_tuned", *where), "train.group_by_length=false"
    summary = finish(search)
    assert summary["train"]["group_by_length"] == "shuffled"
    search.summary.unlink()
    with pytest.raises(
        UserError, match=r"shuffled, not False.*METHODS=lora_tuned TASKS=mrpc ARGS=.*=false sweep\.over"
    ):
        plan("lora_tuned", *where, other)  # the study says so
    (results / "studies" / "studies.db").unlink()
    write_json(search.summary, summary)
    with pytest.raises(UserError, match=r"group_by_length=shuffled, not False.*sweep\.overwrite=true"):
        plan("lora_tuned", *where, other)
    assert plan("lora_tuned", *where, other, "sweep.overwrite=true").study == search.study


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("train.group_by_length=false", "train.group_by_length=shuffled, not False"),
        ("train.schedule=constant", "train.schedule=linear, not constant"),
        ("train.batch_size=16", "32 rows per step, not 16"),
        ("protocol.epochs=2", "protocol.epochs=6, not 2"),
        ("data.max_train=100", "data.max_train=None, not 100"),
        ("model.pooling=null", "model.pooling=mean, not None"),
        ("protocol=both", ""),
        ("train.eval_batch_size=16", ""),
        ("train.gradient_checkpointing=true", ""),
        ("train.batch_size=16 train.grad_accumulation=2", ""),
    ],
)
def test_a_run_takes_a_rate_that_was_searched_under_the_same_conditions(
    where: tuple[str, str], change: str, why: str
) -> None:
    finish(plan("lora_tuned", *where))
    run = ["method=lora_tuned", "task=mrpc", "seed=42", *where, *change.split()]
    if not why:
        assert list_cells("compare", run)[0].config.train.lr == 1e-4
        return
    with pytest.raises(SearchMissingError, match=f"was searched with {why}: make compare .*sweep.overwrite=true"):
        list_cells("compare", run)


def test_a_search_is_found_by_runs_of_another_seed_and_of_plans_that_borrow_its_rate(
    where: tuple[str, str], results: Path
) -> None:
    assert finish(plan("peft/shira", *where))["seed"] == 7, "its entries are drawn by the seed"
    assert list_cells("compare", ["method=peft/shira", "task=mrpc", "seed=42", *where])[0].config.seed == 42
    summary = finish(plan("sparsegrad", *where))
    name = "evidence_mlp_only-minilm-sparsegrad-stsb"
    labels = {"model": "minilm", "method": "sparsegrad", "task": "stsb"}
    write_json(
        results / "studies" / name / "summary.json", {**summary, "study": name, "labels": labels, "protocol": None}
    )
    for borrowing, own in (("evidence_density", "method.keep=4500"), ("evidence_basis", "method.steps=30")):
        cells = list_cells(borrowing, ["task=stsb", "seed=42", own, *where])
        assert {cell.config.train.lr for cell in cells} == {1e-4}


def test_overwriting_deletes_another_search_once_and_none_that_is_asked_for(
    where: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(plan("frozen", *where))
    started: list[Any] = []

    def run(jobs: Any, *_: Any, **__: Any) -> Any:
        started.extend(job for job in jobs if not jobs[job].is_finished)
        yield from ()

    monkeypatch.setattr(search_all, "run_jobs", run)
    same = plan("frozen", *where, "sweep.overwrite=true")
    assert search_all.make([same], 1, dry=False) == 0
    assert not started
    assert "those asked for: 1 of 1 searches" in capsys.readouterr().out
    assert same.is_summarised

    with pytest.raises(UserError) as refused:
        plan("frozen", *where, "train.batch_size=16")
    words = shlex.split(re.search(r"make it anew with (.*), or leave", str(refused.value)).group(1))  # type: ignore[union-attr]
    assert words[:2] == ["METHODS=frozen", "TASKS=mrpc"]
    other = plan("frozen", *words[2].removeprefix("ARGS=").split())  # the remedy, as printed
    assert search_all.make([other], 1, dry=True) == 0
    assert "0 of 1 studies complete" in (said := capsys.readouterr().out)
    assert "frozen-mrpc is made anew: it was made with 32 rows per step, not 16" in said
    assert same.is_summarised, "a listing deletes nothing"
    assert search_all.make([other], 1, dry=False) == 1
    assert not other.summary.exists()
    (job,) = started
    assert not any("overwrite" in word for word in job.command), "a second worker would delete the study of the first"
    begun = open_study(other.plan).study
    assert search_all.make([other], 1, dry=False) == 1
    assert begun.get_trials() == [], "still there: the same command continues it"

    store(other, TrialState.PRUNED)
    assert searches.find_staleness(other) == "no trial was completed"
    larger = replace(other.plan, sweep=replace(other.plan.sweep, trials=2))
    assert "budget is 1, not 2" in searches.find_staleness(replace(other, plan=larger))


def test_a_refused_search_of_a_table_names_its_task(where: tuple[str, str]) -> None:
    given = ["task=mrpc", *where]
    finish(searches.planned_searches("table13", "mini", None, given)[0])
    with pytest.raises(UserError, match=r'anew with ARGS="task=mrpc .* train\.batch_size=16 sweep\.overwrite=true"'):
        searches.planned_searches("table13", "mini", None, [*given, "train.batch_size=16"])


def test_a_finished_search_that_cannot_be_summarised_now_does_not_count_as_without_trials(
    where: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = plan("frozen", *where)
    store(search, TrialState.COMPLETE)

    def refuse(*_: Any) -> None:
        raise ResourceError("summary.json cannot be written: the disk is full")

    monkeypatch.setattr(search_all, "export", refuse)
    assert not search.is_barren
    with pytest.raises(ResourceError, match="the disk is full"):
        search_all.make([search], 1, dry=False)
    monkeypatch.setattr("sparsegrad.sweeps.show.find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib"):
        search_all.make([search], 1, dry=False, plots=True)


def test_an_unfinished_summary_is_exported_again(where: tuple[str, str]) -> None:
    search = plan("frozen", *where)
    summary = finish(search)
    write_json(search.summary, {**summary, "trials": {**summary["trials"], "complete": 0}})
    with pytest.raises(UserError, match="has 0 of 1 trials: make compare SCALE=mini METHODS=frozen TASKS=mrpc"):
        list_cells("compare", ["method=frozen", "task=mrpc", "seed=42", *where])
    search_all.export_finished(search)
    assert read_json(search.summary)["trials"]["complete"] == 1


def test_a_method_whose_trials_all_diverged_does_not_stop_the_others(
    where: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(plan("frozen", *where), TrialState.PRUNED)
    finish(plan("bitfit", *where))
    made: list[str] = []
    monkeypatch.setattr(command.evidence, "make", lambda cells, workers: made.extend(one.label for one in cells) or 0)
    monkeypatch.setattr(command, "write_comparison", lambda *_: "the table")
    given = ["--methods", "frozen,bitfit", "--tasks", "mrpc", *where]
    assert command.main([*given, "seed=42,3705", "--dry"]) == 0
    said = capsys.readouterr().out
    assert "2 cells wait for their searches" in said
    assert "0 of 4 cells complete" in said
    assert "hours left" in said, "of those that wait, too"
    assert not made

    assert command.main([*given, "seed=42"]) == 1
    said = capsys.readouterr().out
    assert "frozen-mrpc: none of its 1 trials was completed (training diverged)" in said
    assert "make it anew with METHODS=frozen TASKS=mrpc ARGS=" in said
    assert "left out: frozen on mrpc" in said
    assert made == ["mrpc 42 bitfit"]
    assert "the table" in said


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
    monkeypatch.setattr(command.evidence, "make", lambda cells, _: made.extend(one.config.force for one in cells) or 0)
    monkeypatch.setattr(command, "write_comparison", lambda *_: "the table")
    assert command.main(["--methods", "peft", "--tasks", "mrpc", "seed=42", *where]) == 0
    assert made == [not is_edited]
    reason = "its plan compare was edited afterwards" if is_edited else "run it again with force=true"
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
    assert command.compare("compare_smollm2", request) == 0
    assert written == []
    write_json(request.results / "runs" / "evidence_smollm2" / "0.json", {})
    assert command.compare("compare_smollm2", request) == 0
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
    for name in command.PLANS:
        cases.plan(name, rules, grid=grid)
    for seed in SEEDS:
        for method, accuracy in (("lora_tuned", 0.8), ("dora", 0.84)):
            cases.run(method, "mrpc", seed, accuracy, folder="compare")
    context = Context(cases.results, collect_cells(cases.results / "runs"), "mini")
    tables, figures = write_comparisons(context)
    assert [table.name for table in tables] == ["compare"]
    assert [path.name for path in figures.values()] == ["compare.png"]
    assert {path.suffix for path in (cases.results / "compare").iterdir()} >= {".md", ".csv", ".png"}
