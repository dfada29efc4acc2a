"""A run: skipped, forced, saved; what its protocol touches, and what its record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import Composer, RunPy, Tiny, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from sparsegrad import cli
from sparsegrad.errors import UserError
from sparsegrad.models.loading import load_tokenizer
from sparsegrad.runs import runner as runs
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder
from sparsegrad.runs.tokenized_splits import token_sets

METHODS = ("full", "lora", "lora_tuned", "meprop", "sparsegrad", "layer", "sparsegrad_authors", "sparsegrad_fast")
LAYER = ("method=sparsegrad", "method.engine=layer")

# Two evaluations like guessing, then a perfect one, then a worse one.
LEARNS = ("method=full", "train.lr=3e-3", "protocol.eval_steps=4", "protocol.max_steps=20", "protocol.patience=null")


def method(name: str) -> tuple[str, ...]:
    return LAYER if name == "layer" else (f"method={name}",)


def curves(record: dict[str, Any]) -> list[float]:
    """All that a run measured on the way."""
    rows = [*record["evaluations"], *record["losses"]]
    return [value for row in rows for _, value in sorted(row.items())]


def steps(record: dict[str, Any]) -> list[int]:
    return [row["step"] for row in record["evaluations"]]


class Stop(TrainerCallback):  # type: ignore[misc]
    """Raises at a step, or (0) at the end of training, as Ctrl-C does; notes where training began."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.began = step, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.step == 0:
            raise KeyboardInterrupt


def test_a_run_whose_record_exists_is_skipped_and_forced_again(
    conf: Composer, small: tuple[str, ...], tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run_command(conf(*small))
    path = tiny().record_path
    written = path.stat().st_mtime_ns
    assert "already run" not in capsys.readouterr().out
    cli.run_command(conf(*small))
    assert path.stat().st_mtime_ns == written
    assert f"seed 42: already run, from record {path} (force=true runs again)" in capsys.readouterr().out
    cli.run_command(conf(*small, "force=true"))
    assert path.stat().st_mtime_ns > written


def test_a_record_of_other_data_is_not_taken_for_this_run(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny()
    run(first)
    other = tiny(f"data.dir={write_rows(tmp_path / 'other', train=20)}")
    assert other.key == first.key
    with pytest.raises(UserError, match=r"made with other data .*name=, or force=true"):
        run(other)
    assert run(tiny(f"data.dir={tmp_path / 'other'}", "force=true"))[0]["data"]["train_rows"] == 20


def test_a_run_leaves_its_record_and_nothing_else(tiny: Tiny) -> None:
    config = tiny()
    record, _ = run(config)
    assert json.loads(config.record_path.read_text()) == record
    found = [path for path in Path(config.results_dir).rglob("*") if path.is_file()]
    assert sorted(found) == [config.record_path, config.record_path.with_suffix(".npz")]
    assert not config.run_folder.exists()


def test_protocol_heldout_touches_validation_once_and_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    predict = runs.RunTrainer.predict
    monkeypatch.setattr(
        runs.RunTrainer, "predict", lambda self, rows, **more: seen.append(len(rows)) or predict(self, rows, **more)
    )
    config = tiny("protocol=heldout", "protocol.eval_steps=1")
    record, _ = run(config)
    result = record["result"]
    assert seen == [10]
    assert record["data"] | {"fingerprint": ""} == {
        "fingerprint": "",
        "train_rows": 22,
        "choose_rows": 2,
        "validation_rows": 10,
    }
    assert (result["split"], result["chosen_on"]) == ("validation", "heldout")
    assert len(record["evaluations"]) == 4
    assert all(row["accuracy"] in (0, 0.5, 1) for row in record["evaluations"])  # of two held-out rows
    assert result["chosen_score"] == max(row["accuracy"] for row in record["evaluations"])


def test_protocol_both_has_the_value_of_either_rule(tiny: Tiny) -> None:
    record, _ = run(tiny(*LEARNS, "protocol=both"))
    result, seen = record["result"], {row["step"]: row["accuracy"] for row in record["validations"]}
    assert list(seen) == steps(record) == [4, 8, 12, 16, 20]
    assert len(set(seen.values())) > 1, "a score that never moves proves nothing"
    assert result["chosen_on"] == "heldout"
    assert result["value"] == seen[result["chosen_step"]]  # the held-out rows' choice, scored
    assert result["best_on_validation"]["value"] == max(seen.values())
    assert seen[result["best_on_validation"]["step"]] == max(seen.values())


def test_held_out_rows_are_no_validation_rows(tiny: Tiny) -> None:
    config = tiny("protocol=heldout")
    splits = config.task.load(config.data)
    sets = token_sets(config, splits, load_tokenizer(config.model))
    rows = {name: {tuple(row) for row in getattr(sets, name)["input_ids"]} for name in ("train", "choose", "report")}
    assert len(set.union(*rows.values())) == sum(map(len, rows.values())) == 34


def test_protocol_paper_reports_the_best_evaluation(tiny: Tiny) -> None:
    record, _ = run(tiny(*LEARNS))
    scores = [row["accuracy"] for row in record["evaluations"]]
    result = record["result"]
    assert len(set(scores)) > 1, "a score that never moves proves nothing"
    assert result["value"] == result["chosen_score"] == max(scores)
    assert result["chosen_step"] == 4 * (1 + scores.index(max(scores)))
    assert (result["split"], result["chosen_on"], result["steps"]) == ("validation", "validation", 20)
    assert result["scores"] == {"accuracy": max(scores)}


def test_the_model_that_is_scored_is_the_chosen_one(tiny: Tiny) -> None:
    config = tiny(*LEARNS, "save_model=true")
    record, _ = run(config)
    validation = Path(config.data.dir or "", "sst2", "validation.jsonl")
    rows = [json.loads(line) for line in validation.read_text().splitlines()]
    guesses = logits(model_folder(config), [row["sentence"] for row in rows]).argmax(-1).tolist()
    right = sum(guess == row["label"] for guess, row in zip(guesses, rows, strict=True))
    assert record["result"]["chosen_step"] < 20
    assert right / len(rows) == record["result"]["value"]


@pytest.mark.parametrize(
    ("given", "batch", "total", "interval"),
    [(None, 16, 1000, 100), (None, 32, 1000, 50), (None, 12, 1000, 133), (None, 16, 60, 60), (None, 3200, 9, 1),
     (75, 16, 1000, 75), (75, 16, 50, 50)],
)  # fmt: skip
def test_steps_between_evaluations(tiny: Tiny, given: int | None, batch: int, total: int, interval: int) -> None:
    protocol = tiny(f"protocol.eval_steps={'null' if given is None else given}").protocol
    assert protocol.steps_between_evaluations(100, batch, total) == interval


def test_accumulated_micro_batches_are_one_batch(tiny: Tiny) -> None:
    dropout = [f"+model.architecture.{where}_dropout_prob=0" for where in ("hidden", "attention_probs")]
    same = ("method=full", "train.lr=1e-3", "protocol.max_steps=6", *dropout)
    whole, _ = run(tiny(*same))
    parts, _ = run(tiny(*same, "train.batch_size=2", "train.grad_accumulation=2"))
    assert curves(parts) == pytest.approx(curves(whole), rel=1e-3)


def logits(folder: Path, texts: list[str]) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return answer(model, AutoTokenizer.from_pretrained(folder), texts)


def answer(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_is_an_ordinary_one_with_the_trained_answers(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    texts, caught = ["a good film", "awful and dull, really"], []
    save = runs.save_results

    def saved(config: RunConfig, parts: Any, *more: Any) -> None:
        caught.append(answer(parts.model, parts.tokenizer, texts))
        save(config, parts, *more)

    monkeypatch.setattr(runs, "save_results", saved)
    config = tiny(*method(name), "model=roberta_base", "save_model=true")
    run(config)
    folder = model_folder(config)
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.id2label == {0: "negative", 1: "positive"}
    torch.testing.assert_close(logits(folder, texts), caught[0], rtol=1e-4, atol=1e-5)
    assert not (config.run_folder / "checkpoints").exists()


def test_labels_become_fields_of_the_record(tiny: Tiny) -> None:
    assert run(tiny(), labels={"study": "s", "trial": 3})[0]["trial"] == 3


@pytest.mark.parametrize("name", ["full", "sparsegrad", "layer", "lora"])
def test_bf16_runs_and_keeps_float32_weights(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    caught: list[Any] = []
    describe = runs.describe_run
    monkeypatch.setattr(
        runs, "describe_run", lambda config, parts, *more: caught.append(parts.model) or describe(config, parts, *more)
    )
    record, _ = run(tiny(*method(name), "train.precision=bf16"))
    assert record["config"]["train"]["precision"] == "bf16"
    assert {parameter.dtype for parameter in caught[0].parameters()} == {torch.float32}
    assert all(row["loss"] is not None for row in record["evaluations"])


def test_an_equal_calibration_is_reused_and_another_is_not(tiny: Tiny) -> None:
    made, reused = (run(tiny(f"name=n{i}"))[0] for i in range(2))
    assert (made["calibration"]["reused"], reused["calibration"]["reused"]) == (False, True)
    assert made["calibration"]["fingerprint"] == reused["calibration"]["fingerprint"]
    assert curves(made) == curves(reused)
    assert run(tiny("train.lr=1e-3"))[0]["calibration"]["reused"]
    for other in ("seed=1", "method.steps=3", "train.batch_size=6", "data.max_train=20"):
        assert not run(tiny(other))[0]["calibration"]["reused"]


def test_multirun_leaves_one_record_each(run_py: RunPy, small: tuple[str, ...], tiny: Tiny) -> None:
    done = run_py("-m", *small, "seed=1,2")
    assert done.returncode == 0, done.stderr
    records = [tiny(f"seed={seed}").record_path for seed in (1, 2)]
    assert all(path.is_file() for path in records)
    assert set(records[0].parent.glob("*.json")) == set(records)
    assert len(list(records[0].parent.iterdir())) == 4  # each with its predictions
