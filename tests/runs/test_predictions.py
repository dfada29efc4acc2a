"""Predictions per row beside each record, the plan in the record, and the settings that healthy runs need."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_zoo import tiny_model
from run_fixtures import Composer, RunPy, Tiny, last_wins

from sparsegrad.errors import ResourceError, UserError
from sparsegrad.models.pooling import set_pooling
from sparsegrad.runs.config import build
from sparsegrad.runs.plan import plan_hash
from sparsegrad.runs.predictions import (
    describe_arrays,
    make_arrays,
    predictions_path,
    read_predictions,
    write_predictions,
)
from sparsegrad.runs.runner import run
from sparsegrad.runs.trainer_setup import training_arguments
from sparsegrad.tasks import Task
from sparsegrad.trainer.trainer import RunTrainer


@pytest.mark.parametrize("protocol", ["paper", "heldout", "both"])
def test_the_predictions_have_the_score_of_the_record(
    tiny: Tiny, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(f"protocol={protocol}", "protocol.max_steps=8", "protocol.eval_steps=2")
    take_kept, compared = RunTrainer.predict_best, []

    def predict_again(trainer: Any) -> Any:
        """What the evaluation of the best checkpoint kept is what that checkpoint predicts."""
        kept = take_kept(trainer)
        anew = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        assert anew is not kept
        assert np.array_equal(anew.predictions, kept.predictions)
        compared.append(trainer.state.best_global_step)
        return kept

    monkeypatch.setattr(RunTrainer, "predict_best", predict_again)
    record, _ = run(config)
    assert compared == ([record["result"]["chosen_step"]] if protocol == "paper" else [])
    found = read_predictions(config.record_path, record)
    assert found["predicted"].dtype == found["label"].dtype == np.uint8
    assert len(found["label"]) == record["data"]["validation_rows"] == record["predictions"]["rows"]
    assert (found["predicted"] == found["label"]).mean() == pytest.approx(record["result"]["value"])


def test_classes_above_255_and_numbers_beyond_float16_are_kept() -> None:
    many = Task(
        name="t", columns=("a",), labels=tuple(f"l{i}" for i in range(300)), main_metric="accuracy", eval_base=1
    )
    logits = np.zeros((2, 300), np.float32)
    logits[0, 299] = logits[1, 7] = 1
    found = make_arrays(many, logits, [299, 299], [0, 1])
    assert (found["predicted"].tolist(), found["label"].tolist()) == ([299, 7], [299, 299])
    number = Task(name="t", columns=("a",), main_metric="pearson", eval_base=1)
    found = make_arrays(number, np.array([[1e5], [2.0]], np.float32), [1e5, 2.0], [0, 1])
    assert found["label"].tolist() == [1e5, 2.0]
    usual = make_arrays(number, np.array([[1.0], [2.0]]), [3.2, 4.0], [0, 1])
    assert usual["label"].dtype == usual["predicted"].dtype == np.float16
    for number_of_row in (1e5, np.inf, np.nan):
        large = make_arrays(number, np.array([[number_of_row], [2.0]], np.float32), [3.2, 4.0], [0, 1])
        assert large["predicted"].dtype == np.float32
        assert np.array_equal(large["label"], usual["label"]), "runs are paired by labels that do not depend on them"


def test_rows_are_in_the_order_of_the_data_for_every_seed(tiny: Tiny) -> None:
    """Evaluation by length visits them in an order that depends on the seed; a comparison of seeds pairs rows."""
    for seed in (1, 2):
        config = tiny("train.group_by_length=true", f"seed={seed}", "train.eval_batch_size=4")
        record, _ = run(config)
        found = read_predictions(config.record_path, record)
        validation = config.task.load(config.data).validation
        assert found["label"].tolist() == list(validation["label"])
        assert (found["predicted"] == found["label"]).mean() == pytest.approx(record["result"]["value"])


def test_predictions_of_another_run_are_refused(tiny: Tiny) -> None:
    config = tiny()
    record, _ = run(config)
    write_predictions(config.record_path, {"predicted": np.zeros(10, np.uint8), "label": np.ones(10, np.uint8)})
    with pytest.raises(UserError, match=r"does not belong to .*force=true"):
        read_predictions(config.record_path, record)
    predictions_path(config.record_path).write_bytes(b"not a file of arrays")
    with pytest.raises(UserError, match=r"cannot be read .*force=true"):
        read_predictions(config.record_path, record)
    predictions_path(config.record_path).unlink()
    with pytest.raises(UserError, match=r"is missing: .*force=true"):
        read_predictions(config.record_path, record)
    with pytest.raises(UserError, match="made without predictions"):
        read_predictions(config.record_path, {name: one for name, one in record.items() if name != "predictions"})


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_predictions_that_the_disk_does_not_give_are_not_called_damaged(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, path = {"predicted": np.zeros(3, np.uint8), "label": np.ones(3, np.uint8)}, tmp_path / "key.json"
    write_predictions(path, arrays)

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match=r"cannot read .*key.npz .*nothing was deleted"):
        read_predictions(path, {"predictions": describe_arrays(arrays)})


def test_equal_arrays_give_equal_files(tmp_path: Path) -> None:
    arrays = {"predicted": np.arange(5, dtype=np.float16), "label": np.arange(5, dtype=np.float16)}
    for name in ("a", "b"):
        write_predictions(tmp_path / f"{name}.json", arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert describe_arrays(arrays) != describe_arrays({**arrays, "label": arrays["label"] + 1})


def test_a_plan_is_known_by_what_it_says(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml")]
    for path, text in zip(paths, ("a: 1\nb: {c: 2}\n", "# why\nb:\n  c: 2\na: 1\n", "a: 1\nb: {c: 3}\n"), strict=True):
        path.write_text(text)
    assert plan_hash(paths[0]) == plan_hash(paths[1]) != plan_hash(paths[2])


def test_the_record_names_its_plan(run_py: RunPy, small: tuple[str, ...], tmp_path: Path) -> None:
    done = run_py(*last_wins("experiment=quickstart", *small, "name=planned"))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results" / "runs" / "planned").glob("*.json")
    plan = json.loads(path.read_text())["plan"]
    assert plan["experiment"] == "quickstart"
    assert len(plan["sha256"]) == 16


def test_warm_up_is_a_share_of_the_steps_and_a_linear_schedule_ends_at_zero(tiny: Tiny) -> None:
    config = tiny("train.warmup_ratio=0.25", "train.schedule=linear", "protocol.max_steps=8")
    arguments = training_arguments(config, 24, resuming=False)
    assert (arguments.warmup_steps, arguments.lr_scheduler_type) == (2, "linear")
    arguments = training_arguments(tiny("train.warmup_ratio=0.25"), 24, resuming=False)
    assert arguments.lr_scheduler_type == "constant_with_warmup"
    with pytest.raises(UserError, match=r"train\.warmup_ratio=0\.1.*train\.warmup_steps"):
        tiny("train.warmup_ratio=0.1", "train.warmup_steps=3")


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (
            ("train.warmup_steps=50", "protocol.max_steps=5"),
            "train.warmup_steps=50 .* 5 steps: .* 8 % of train.lr=0.01; ",
        ),
        (("train.warmup_steps=4",), "train.warmup_steps=4 .* 4 steps: .* 75 % .* train.warmup_steps=0"),
        (("train.warmup_steps=3",), ""),
        (("train.warmup_ratio=0.95",), ""),
        ((), ""),
    ],
)
def test_a_warm_up_that_takes_the_whole_run_is_mentioned_once(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...], warned: str
) -> None:
    run(tiny("method=full", *overrides))
    found = [one.getMessage() for one in caplog.records if one.name == "sparsegrad.runs.trainer_setup"]
    assert len(found) == bool(warned)
    assert not warned or re.search(warned, found[0])


def test_only_a_run_from_the_start_evaluates_the_untrained_model(tiny: Tiny) -> None:
    config = tiny("protocol.eval_at_start=true")
    assert training_arguments(config, 24, resuming=False).eval_on_start
    assert not training_arguments(config, 24, resuming=True).eval_on_start


def test_mean_pooling_leaves_padding_out() -> None:
    model = tiny_model("bert", torch.float64)
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    mask = (ids > 0).long()
    states = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    set_pooling(model, "mean")
    padded = model(input_ids=ids, attention_mask=mask).logits
    alone = model(input_ids=ids[:, :3], attention_mask=mask[:, :3]).logits
    torch.testing.assert_close(padded, alone)
    by_hand = model.classifier(torch.tanh(model.bert.pooler.dense(states[:, :3].mean(1))))
    torch.testing.assert_close(padded, by_hand)


@pytest.mark.parametrize("layout", ["roberta", "mpnet", "electra"])
def test_mean_pooling_reaches_the_head_of_every_layout(layout: str) -> None:
    model = tiny_model(layout, torch.float64)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits
    set_pooling(model, "mean")
    assert not torch.allclose(before, model(input_ids=ids).logits)


def test_pooling_that_cannot_be_is_refused(conf: Composer, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"model\.pooling=mean.*DistilBert"):
        set_pooling(tiny_model("distilbert"), "mean")
    with pytest.raises(UserError, match=r"save_model=True.*model\.pooling=mean"):
        run(tiny("model.pooling=mean", "save_model=true"))
    assert build(conf("model.pooling=mean")).key != build(conf()).key


def test_a_run_with_mean_pooling_ends_complete(tiny: Tiny) -> None:
    assert run(tiny("model.pooling=mean"))[0]["status"] == "complete"
