"""Which searches a run may use, and which `sweep.overwrite=true` deletes."""

from __future__ import annotations

import errno
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from search_cases import finish, plan, store
from search_cases import results as results  # the fixtures
from search_cases import where as where

from experiments.compare import __main__ as command
from experiments.paths import ROOT
from experiments.reproduce import search_all, searches, stale_searches
from experiments.reproduce.cells import list_cells
from sparsegrad.errors import ResourceError, UserError
from sparsegrad.files import read_json, write_json
from sparsegrad.sweeps import search_way
from sparsegrad.sweeps.search_results import SearchMissingError
from sparsegrad.sweeps.study import open_study

SHIRA = "method.config.peft_type=SHIRA"


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
    assert (
        f'make compare SCALE=mini METHODS=peft TASKS=mrpc ARGS="{" ".join(where)} {SHIRA} sweep.overwrite=true"'
        in error
    )
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
        results / "studies" / name / "summary.json",
        {**summary, "study": name, "labels": labels, "metric": "pearson", "protocol": None},
    )
    for borrowing, own in (("evidence_density", "method.keep=4500"), ("evidence_basis", "method.steps=30")):
        cells = list_cells(borrowing, ["task=stsb", "seed=42", own, *where])
        assert {cell.config.train.lr for cell in cells} == {1e-4}


def test_overwriting_deletes_another_search_once_and_none_that_is_asked_for(
    where: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(plan("frozen", *where))
    started: list[Any] = []

    def run(jobs: Any, _: int, is_needed: Any, *__: Any, **___: Any) -> Any:
        started.extend(filter(is_needed, jobs))
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
    assert words[:5] == ["make", "compare", "SCALE=mini", "METHODS=frozen", "TASKS=mrpc"]
    other = plan("frozen", *words[5].removeprefix("ARGS=").split())  # the remedy, as printed
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
    assert stale_searches.find_staleness(other) == "no trial was completed"
    larger = replace(other.plan, sweep=replace(other.plan.sweep, trials=2))
    assert "budget is 1, not 2" in stale_searches.find_staleness(replace(other, plan=larger))


def test_a_search_of_other_data_is_made_anew_without_the_records_of_the_old_data(
    where: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan("frozen", *where)
    write_json(first.summary, {**finish(first), "content": {"data": "old"}})
    search = plan("frozen", *where, "sweep.overwrite=true", f"work_dir={tmp_path / 'checkpoints'}")
    assert not stale_searches.find_staleness(search), "the data is not at hand"
    monkeypatch.setattr(search_way, "_read_fingerprint", lambda _: "old")
    assert not stale_searches.find_staleness(search)
    monkeypatch.setattr(search_way, "_read_fingerprint", lambda _: "new")
    assert stale_searches.find_staleness(search) == "its data has the fingerprint old, not new"

    monkeypatch.setattr(stale_searches, "read_fingerprint", lambda _: "new")
    trial = search.plan.trial_config({"train.lr": 1e-4})
    for one in (trial, search.plan.trial_config({"train.lr": 2e-4})):  # without an owner, as of earlier versions
        one.checkpoints.mkdir(parents=True)
        (one.checkpoints / "data").write_text("old")
    folder = search.plan.base.record_path.parent
    any_record = read_json(next((ROOT / "results" / "runs" / "evidence_gates").glob("*.json")))
    for name in ("old", "new"):
        write_json(folder / f"{name}.json", {**any_record, "data": {"fingerprint": name}})
        (folder / f"{name}.npz").touch()
    (folder / "damaged.json").write_text("{")
    stale_searches.delete_search(search)
    assert not first.summary.exists()
    assert search.load_study() is None
    assert not trial.checkpoints.exists()
    assert one.checkpoints.exists(), "of no trial of the study"
    assert sorted(path.name for path in folder.iterdir()) == ["damaged.json", "new.json", "new.npz"]


def test_a_record_that_cannot_be_read_now_stops_the_deletion_of_a_search(
    where: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan("frozen", *where)
    write_json(first.summary, {**finish(first), "content": {"data": "old"}})
    unread = first.plan.base.record_path.parent / "unread.json"
    unread.parent.mkdir(parents=True, exist_ok=True)
    unread.symlink_to(unread)  # which cannot be opened: it stands for any failure of the disk
    monkeypatch.setattr(stale_searches, "read_fingerprint", lambda _: "new")
    with pytest.raises(ResourceError, match="nothing was deleted"):
        stale_searches.delete_search(plan("frozen", *where, "sweep.overwrite=true"))
    assert first.summary.exists()


def test_a_refused_search_of_a_table_names_its_task(where: tuple[str, str]) -> None:
    given = ["task=mrpc", *where]
    finish(searches.planned_searches("table13", "mini", None, given)[0])
    with pytest.raises(
        UserError,
        match=r'make reproduce-table13 SCALE=mini ARGS="task=mrpc .* train\.batch_size=16 sweep\.overwrite=true"',
    ):
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


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"trials": {"complete": 1}}'])
def test_a_damaged_summary_does_not_begin_its_search_again(
    damage: str, where: tuple[str, str], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = plan("frozen", *where)
    finish(search)
    search.summary.write_text(damage)
    assert search.finished() == 1, "the storage has it"
    search_all.export_finished(search)
    assert search.is_summarised

    (results / "studies" / "studies.db").unlink()
    assert search.finished() == 1
    search.summary.write_text(damage)
    with pytest.raises(UserError, match=r"summary\.json is not a summary of a search .*restore it, or delete it"):
        plan("frozen", *where)
    with pytest.raises(UserError, match=r"summary\.json is not a summary of a search .*restore it; else make compare"):
        list_cells("compare", ["method=frozen", "task=mrpc", "seed=42", *where])

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ResourceError, match=r"Input/output error.*try again"):
        search.finished()


def test_an_unfinished_summary_is_exported_again(where: tuple[str, str]) -> None:
    search = plan("frozen", *where)
    summary = finish(search)
    write_json(search.summary, {**summary, "trials": {**summary["trials"], "complete": 0}})
    with pytest.raises(UserError, match="has 0 of 1 trials: make compare SCALE=mini METHODS=frozen TASKS=mrpc"):
        list_cells("compare", ["method=frozen", "task=mrpc", "seed=42", *where])
    search_all.export_finished(search)
    assert read_json(search.summary)["trials"]["complete"] == 1
