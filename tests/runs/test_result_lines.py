"""What a run says before and after it trains, where it writes, and what it warns of."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_fixtures import ROOT, Composer, Tiny, write_rows

from experiments.published import score_of
from experiments.reproduce.cells import in_evidence
from sparsegrad import interrupt, threads
from sparsegrad.cli import quickstart_table, running
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.predictions import describe_arrays, write_predictions
from sparsegrad.runs.result_lines import describe_result, find_troubles
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder


def test_a_users_files_are_outside_the_evidence(conf: Composer) -> None:
    config = build(conf("sweep=quick"))
    places = [config.record_path, config.run_folder, config.adapter_folder, Path(conf("sweep=quick").sweep.storage)]
    assert {path.parts[0] for path in places} == {"outputs"}


def test_reproducing_names_the_evidence_unless_told_otherwise() -> None:
    assert in_evidence(["seed=1"]) == ["results_dir=results", "seed=1"]
    assert in_evidence(["seed=1", "results_dir=x"]) == ["seed=1", "results_dir=x"]


def test_make_clean_leaves_what_a_user_made() -> None:
    recipe = re.search(r"^clean:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert not {"outputs", "results", "runs"} & {word.split("/")[0] for word in recipe[1].split()}


def test_threads_give_way_before_torch_is_imported() -> None:
    for name in ("run.py", "sparsegrad/__init__.py"):
        texts = [ast.unparse(line) for line in ast.parse((ROOT / name).read_text()).body]
        ours = [text for text in texts if "import" in text and not text.startswith(("import sys", "from pathlib"))]
        assert ours[0] == "from sparsegrad import interrupt as interrupt"
    assert "setdefault('OMP_WAIT_POLICY', 'PASSIVE')" in ast.unparse(ast.parse(Path(interrupt.__file__).read_text()))


@pytest.mark.parametrize(
    ("siblings", "quota", "cores"),
    [({0: "0", 1: "1"}, None, 2), ({0: "0,1", 1: "0,1"}, None, 1), (dict(enumerate("01234567")), None, 7),
     (dict(enumerate("01234567")), 3, 3)],
)  # fmt: skip
def test_threads_are_the_cores_that_a_process_may_use(
    monkeypatch: pytest.MonkeyPatch, siblings: dict[int, str], quota: int | None, cores: int
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(siblings), raising=False)
    monkeypatch.setattr(threads, "_read_siblings", siblings.__getitem__)
    monkeypatch.setattr(threads, "_read_quota", lambda: quota)
    assert threads.usable_cores() == cores


def test_the_users_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(threads.torch, "set_num_threads", lambda _: pytest.fail("changed"))
    threads.limit_threads()


def test_a_run_says_what_it_does_and_where_it_is(
    conf: Composer, small: tuple[str, ...], tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    running.run_command(conf(*small, "save_model=true"))
    config, (out, err) = tiny("save_model=true"), capsys.readouterr()
    names = [line.split()[0] for line in out.splitlines()]
    score = names.index("minilm")
    assert names[:score] == ["run", "data", "steps", "record"]
    assert names[score + 1 :] == ["against", "time", "memory", "record", "model"]
    assert out.count(str(config.record_path)) == 2
    assert str(model_folder(config)) in out
    assert "the majority class 0.5000" in out
    record = json.loads(config.record_path.read_text())
    counts = record["trainable"]
    assert f"MLP weights {counts['mlp']['trained']:,} of {counts['mlp']['total']:,}" in out
    assert counts["mlp"]["trained"] < counts["mlp"]["total"]
    assert "\r" not in out + err
    assert "├" not in out, "the whole configuration is for verbose=true"


def test_quiet_prints_the_score_alone(
    conf: Composer, small: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEGRAD_QUIET", "0")  # restored after the test
    running.run_command(conf(*small, "quiet=true"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("minilm / ")


def test_a_record_without_a_value_is_not_compared_with(tiny: Tiny) -> None:
    """Such as one whose Pearson correlation is undefined."""
    full = [tiny("method=full", f"seed={seed}") for seed in (1, 2)]
    records = [run(config)[0] for config in full]
    other, _ = run(tiny("method=lora"))
    records[0]["result"]["value"] = None
    full[0].record_path.write_text(json.dumps(records[0]))
    text = "\n".join(describe_result(tiny("method=lora"), other))
    assert f"full fine-tuning {records[1]['result']['value']:.4f}\n" in text


def show_comparison(config: RunConfig, record: dict[str, Any]) -> str:
    lines = [line for line in describe_result(config, record) if line.startswith("against")]
    return lines[0].partition("full fine-tuning ")[2] if lines else ""


def test_full_fine_tuning_on_other_data_or_otherwise_is_not_compared_with(tiny: Tiny, tmp_path: Path) -> None:
    others = ("data.max_train=8", "data.max_eval=4", f"data.dir={write_rows(tmp_path / 'other', train=20)}",
              "train.train_rest=false", "train.grad_accumulation=2", "model.architecture.hidden_size=16")  # fmt: skip
    for other in others:
        run(tiny("method=full", "protocol.max_steps=2", other))
    config = tiny("method=lora", "protocol.max_steps=2")
    record, _ = run(config)
    assert show_comparison(config, record) == ""
    value = run(tiny("method=full", "protocol.max_steps=2", "force=true"))[0]["result"]["value"]
    assert show_comparison(config, record) == f"{value:.4f}"


def test_scores_of_another_metric_are_not_compared_with(tiny: Tiny) -> None:
    run(tiny("method=full", "protocol.max_steps=2"))
    config = tiny("method=lora", "protocol.max_steps=2", "task.main_metric=f1", "+task.metric=accuracy_f1")
    record, _ = run(config)
    assert show_comparison(config, record) == ""
    assert score_of("bert_base", "full", "mrpc", "f1") is None
    assert score_of("bert_base", "full", "mrpc", "accuracy") is not None


def test_another_learning_rate_of_full_fine_tuning_is_named(tiny: Tiny) -> None:
    for rate in ("1e-3", "2e-5"):
        run(tiny("method=full", "protocol.max_steps=2", f"train.lr={rate}"))
    config = tiny("method=lora", "protocol.max_steps=2")
    assert show_comparison(config, run(config)[0]).endswith("(mean of 2 records, train.lr 2e-05, 0.001)")


def make_record(losses: list[float], steps: int = 100) -> dict[str, Any]:
    return {
        "config": {"task": {"labels": ["no", "yes"]}},
        "result": {"steps": steps},
        "losses": [{"step": 10 * number, "loss": loss} for number, loss in enumerate(losses)],
    }


@pytest.mark.parametrize(
    ("losses", "predicted", "said"),
    [
        ([0.69, 0.5, 0.4], [0, 1, 1, 0], []),
        ([0.69, 0.8, 0.7], [0, 1, 1, 0], []),
        ([0.7, 30.0, 352.0], [0, 1, 1, 0], ["diverged"]),
        ([400.0, 380.0, 352.0], [0, 1, 1, 0], ["diverged"]),  # the first mean is of steps that had diverged
        ([0.69, 0.69, 0.69], [1, 1, 1, 1], ["same answer"]),
        ([0.7, 30.0, 352.0], [1, 1, 1, 1], ["diverged", "same answer"]),
    ],
)
def test_a_run_without_a_use_is_flagged(tiny: Tiny, losses: list[float], predicted: list[int], said: list[str]) -> None:
    config = tiny()
    arrays = {"predicted": np.array(predicted, np.uint8), "label": np.array([0, 1, 0, 1], np.uint8)}
    config.record_path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(config.record_path, arrays)
    found = find_troubles(config, make_record(losses) | {"predictions": describe_arrays(arrays)})
    assert len(found) == len(said)
    assert all(word in text for word, text in zip(said, found, strict=True))
    short = find_troubles(config, make_record(losses, steps=2) | {"predictions": describe_arrays(arrays)})
    assert not any("same answer" in text for text in short)  # two steps say nothing


def test_the_table_of_the_quickstart_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = json.loads(sorted((ROOT / "results" / "runs" / "quickstart").glob("*.json"))[0].read_text())
    for method, trained in (("lora", 69_120), ("full", 7_077_888)):
        counts = {**source["trainable"], "total": 15_636_098 + trained, "mlp": {"trained": trained, "total": 7_077_888}}
        named = {**source["config"], "method": {"name": method}}
        (tmp_path / f"{method}.json").write_text(json.dumps({**source, "config": named, "trainable": counts}))
    assert quickstart_table.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    full, lora = (next(line.split() for line in lines if line.startswith(name)) for name in ("full", "lora"))
    assert (full[1:4], lora[1:4]) == (["7,077,888", "100.0", "15,636,098"], ["69,120", "1.0", "15,636,098"])
