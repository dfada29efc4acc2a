"""METHODS and TASKS of `make search` and `make evidence`; and that several calls of `make search` share its studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from evidence_commands import empty_glue as empty_glue  # the fixtures
from evidence_commands import places as places
from evidence_commands import results as results
from filelock import FileLock

from experiments.reproduce import evidence, search_all
from experiments.reproduce.costs import RECORDS, Estimates
from experiments.reproduce.processes import EndedJob, Job
from experiments.reproduce.search import Search
from experiments.reproduce.search_all import Request, plan_searches, search_job
from experiments.reproduce.sharing import Shares
from sparsegrad.sweeps.study import open_study


def test_methods_and_tasks_choose_cells_of_a_block(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--methods", "meprop,lora", "--tasks", "stsb,cola", "--dry"]
    assert evidence.main(["2a", *chosen, *places]) == 0
    assert "0 of 12 cells complete" in capsys.readouterr().out
    assert evidence.main(["4", "--methods", "sparsegrad", "--tasks", "sst2", "--dry", *places]) == 0
    said = capsys.readouterr().out
    assert "0 of 18 cells complete" in said
    assert "0 of 12 cells complete" in said


def test_methods_and_tasks_choose_searches_of_block_1(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.main(["1", "--methods", "lora,full", "--tasks", "cola", "--dry", *places]) == 0
    assert "0 of 2 studies complete" in capsys.readouterr().out


def test_blocks_without_the_chosen_methods_are_left_out(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.main(["all", "--methods", "full", "--tasks", "mrpc", "--dry", *places]) == 0
    said = capsys.readouterr().out
    assert "left out: evidence_mlp_only has no METHODS=full on TASKS=mrpc" in said
    assert "0 of 3 cells complete" in said, "block 0, of full fine-tuning alone"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0", "--methods", "lora"], "METHODS=lora is not allowed: choose one of full"),
        (["3", "--tasks", "mrpc"], "TASKS=mrpc is not allowed: choose one of stsb, sst2, cola"),
        (["2a", "--tasks", "stsb", "task=cola"], "TASKS=stsb and ARGS=task=cola exclude each other"),
        (["2a", "--scale", "paper"], "the evidence is of the small models; give SCALE=mini"),
    ],
)
def test_what_a_block_lacks_is_one_line(
    arguments: list[str], message: str, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evidence.main([*arguments, "--dry", *places]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_method_without_searches_is_named(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert search_all.main(["--methods", "static_mask,full", "--tasks", "mrpc", "--dry", *places]) == 0
    said = capsys.readouterr().out
    assert "left out: no plan has METHODS=static_mask on TASKS=mrpc" in said
    assert "SmolLM2" not in said
    assert "0 of 1 studies complete" in said


@pytest.fixture
def searches(places: list[str]) -> list[Search]:
    """Those of three methods on MRPC, none of which is begun."""
    chosen = Request(methods=("full", "lora", "meprop"), tasks=("mrpc",), overrides=tuple(places))
    return plan_searches(chosen)


def order(searches: list[Search], shares: Shares) -> Iterator[str]:
    """The methods in the order of their start."""
    jobs = {search_job(one): one for one in searches}
    for job in shares.pick(jobs, lambda job: not jobs[job].is_finished):
        yield jobs[job].plan.base.method.name


def test_a_call_begins_with_the_studies_that_no_worker_runs(searches: list[Search]) -> None:
    assert open_study(searches[0].plan).take() is not None  # a worker of this process, so that it is alive
    assert searches[0].has_worker
    assert not searches[1].has_worker
    with closing(Shares()) as shares:
        assert list(order(searches, shares)) == ["lora", "meprop", "full"]


def test_calls_share_the_studies_before_their_workers_have_trials(searches: list[Search]) -> None:
    with closing(Shares()) as here, closing(Shares()) as there:
        first, second = order(searches, here), order(searches, there)
        assert [next(first), next(second), next(first)] == ["full", "lora", "meprop"]
        here.release(search_job(searches[0]))
        assert next(second) == "full", "whose worker has ended"
        assert next(second) == "meprop", "nothing else is left"
    with closing(Shares()) as shares:
        assert list(order(searches, shares)) == ["full", "lora", "meprop"], "what ended calls had is free"


def test_make_search_starts_a_study_of_another_call_last(
    places: list[str], empty_glue: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = list[str]()

    def work(jobs: Iterable[Job], _: int, is_needed: Callable[[Job], bool], *__: Any, **___: Any) -> Iterator[EndedJob]:
        for job in filter(is_needed, jobs):
            started.append(job.label)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.touch()
            yield EndedJob(job=job, status=1, minutes=0.1)

    monkeypatch.setattr(search_all, "run_jobs", work)
    locks = tmp_path / "work" / "locks"
    locks.mkdir(parents=True)
    with FileLock(locks / "evidence-minilm-full-mrpc.lock"):
        given = ["--methods", "full,lora", "--tasks", "mrpc", "--data", empty_glue, *places]
        assert search_all.main(given) == 1
    assert started == ["evidence-minilm-lora-mrpc", "evidence-minilm-full-mrpc"]


def test_hours_of_another_task_are_the_last_estimate(tmp_path: Path) -> None:
    """Once a block has one run, its other tasks must not all take as long."""

    def facts(**other: str) -> dict[str, str]:
        return {"experiment": "evidence_mlp_only", "model": "minilm", "method": "meprop", "task": "stsb", **other}

    found = Estimates(tmp_path)
    found._rows[RECORDS] += [
        (facts(), 0.2),
        (facts(experiment="evidence_paper", task="cola"), 0.5),
        (facts(experiment="evidence_paper", task="sst2", method="lora"), 0.7),
    ]
    assert found.of(facts(task="cola"))[0] == 0.5
    assert found.of(facts(task="sst2"))[0] == 0.7
    assert found.of(facts(method="sparsegrad"))[0] == 0.2
    assert found.of(facts(task="mrpc"))[0] == 0.2, "of a task without a run"
