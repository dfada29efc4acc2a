"""What a finished run says: its score, what to compare it with, its cost, where everything is, and what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsegrad.errors import UserError
from sparsegrad.progress import format_seconds
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.keys import determining
from sparsegrad.runs.predictions import Arrays, read_predictions
from sparsegrad.runs.records import find_complete, run_seconds
from sparsegrad.runs.saving import model_folder
from sparsegrad.trainer.checkpoints import newest_step

LABEL = 9  # columns of the words before each line
_ENOUGH = 50  # steps: after fewer, a model may give one answer to everything and yet be learning
_MODEL = ("weights", "architecture", "pooling", "keep_head", "mlp", "kinds", "dense", "blocks")
_MOST = 200  # records that are looked through for a run of full fine-tuning to compare with


Published = Callable[[str, str, str, str], "tuple[float, int] | None"]
"""(model, method, task, metric) -> the paper's score in points and its table; None where it has none."""


def describe_result(config: RunConfig, record: Mapping[str, Any], published: Published | None = None) -> list[str]:
    """The lines after the score: against what, time, memory, and where record, model and adapter are."""
    path, names = config.record_path, (config.model.name, config.method.name, config.task.name)
    printed = published(*names, config.task.main_metric) if published is not None else None
    scores = [] if printed is None else [f"published {printed[0] / 100:.3f} (Table {printed[1]})"]
    scores += [*_constant_scores(record, _read_arrays(path, record)), *_full_scores(path, record)]
    named = {
        "against": "; ".join(scores),
        "time": _describe_time(record),
        "memory": "; ".join(filter(None, [_describe_memory(record), _describe_trainable(record)])),
        "record": str(path),
        "model": str(model_folder(config)) if model_folder(config).is_dir() else "",
        "adapter": str(config.adapter_folder) if config.adapter_folder.is_dir() else "",
    }
    return [f"{name:<{LABEL}}{text}" for name, text in named.items() if text]


def describe_reuse(config: RunConfig) -> str:
    """The line that says that nothing was run; `force=true` keeps a model or adapter that is asked for."""
    wanted = [what for what, asked in (("model", config.save_model), ("adapter", config.save_adapter)) if asked]
    kept = f", and keeps the {' and the '.join(wanted)}" if wanted else ""
    return f"seed {config.seed}: already run, from record {config.record_path} (force=true runs again{kept})"


def describe_stop(config: RunConfig, *, is_one_of_several: bool = False) -> str:
    """What the same command does after this run was stopped, alone or as one run of a multirun."""
    if not is_one_of_several:
        return _describe_restart(config, "the same command")
    if config.force:
        return "the same command starts all runs over, because of force=true"
    own = _describe_restart(config, "this run")
    return f"the same command takes the finished runs from their records and runs the rest; {own}"


def _describe_restart(config: RunConfig, what: str) -> str:
    if not config.force and find_complete(config.record_path) is not None:
        return "the run is complete, and the same command prints its result"
    step = newest_step(config.checkpoints)
    if step is None:
        return f"no checkpoint was written yet, so {what} starts over"
    if config.force:
        return f"{what} starts over, because of force=true"
    without = "" if config.resume else ", without resume=false,"
    return f"{what}{without} continues after step {step:,}"


def find_troubles(config: RunConfig, record: Mapping[str, Any]) -> list[str]:
    """What is wrong with a complete run although it has a score: it diverged, or it gives one answer to everything."""
    found = []
    if jump := _loss_jump(record):
        remedy = f"lower train.lr (here {config.train.lr:g})"
        found.append(f"this run diverged: training loss {jump[0]:.3g} at first, {jump[1]:.3g} at the end; {remedy}")
    arrays = _read_arrays(config.record_path, record)
    predicted, labels = arrays.get("predicted"), arrays.get("label")
    if predicted is None or labels is None or record["result"]["steps"] < _ENOUGH:
        return found
    if len(np.unique(labels)) > 1 and len(np.unique(predicted)) == 1:
        found.append(
            f"this model gives the same answer ({predicted[0]:g}) to all {len(predicted):,} rows: it has learned "
            "nothing; change train.lr, or train longer"
        )
    return found


def _loss_jump(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """First and last training loss, where the last is far above the first; None otherwise."""
    losses = [float(row["loss"]) for row in record.get("losses", []) if row["loss"] is not None]
    if not losses:
        return None
    classes = len(record["config"]["task"].get("labels") or ())
    # The first value is a mean over some steps, which may have diverged already. A new head begins near log(classes).
    first = min(losses[0], math.log(classes)) if classes else losses[0]
    last = sum(losses[-3:]) / len(losses[-3:])
    return (first, last) if last > 1.5 * first and last > first + 0.5 else None


def _read_arrays(path: Path, record: Mapping[str, Any]) -> Arrays:
    try:
        return read_predictions(path, record)
    except UserError:  # an old record, or one that was copied alone
        return {}


def _constant_scores(record: Mapping[str, Any], arrays: Arrays) -> Iterator[str]:
    """The score of the best constant answer."""
    metric, labels = record["result"]["metric"], arrays.get("label")
    if metric in ("matthews_correlation", "pearson", "spearman"):
        yield f"a constant answer {0:.4f}"
    elif metric == "accuracy" and labels is not None:
        yield f"the majority class {np.bincount(labels).max() / len(labels):.4f}"


def _full_scores(path: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """The mean score of full fine-tuning on what `_facts` names, from records beside this one.

    Learning rates may differ, as each method is tuned by itself; then they are named.
    """
    if record["config"]["method"]["name"] == "full":
        return
    found: list[float] = []
    rates: set[float] = set()
    files = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[:_MOST]:
        try:
            other = find_complete(file)
        except UserError:
            continue
        if other is None or other["config"]["method"]["name"] != "full" or _facts(other) != _facts(record):
            continue
        if other["result"]["value"] is not None:  # such as Pearson of a constant prediction, which is undefined
            found.append(float(other["result"]["value"]))
            rates.add(other["config"]["train"]["lr"])
    if found:
        notes = [f"mean of {len(found)} records"] if len(found) > 1 else []
        if rates != {record["config"]["train"]["lr"]}:
            notes.append(f"train.lr {', '.join(f'{rate:g}' for rate in sorted(rates))}")
        yield f"full fine-tuning {sum(found) / len(found):.4f}" + (f" ({', '.join(notes)})" if notes else "")


def _facts(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two runs share whose scores are compared: model, task, data, what trains beside the MLP, and how long."""
    config, data = determining(record["config"]), record.get("data", {})  # older records lack later settings
    model, protocol, train = config["model"], config["protocol"], config["train"]
    return (
        *(config[group]["name"] for group in ("model", "task", "protocol")),
        *(model.get(name) for name in _MODEL),
        record.get("source"),
        config["task"].get("main_metric"),
        *(data.get(name) for name in ("fingerprint", "train_rows")),
        *(protocol.get(name) for name in ("max_steps", "epochs")),
        train.get("train_rest"),
        record.get("batch", {}).get("global"),
    )


def _describe_time(record: Mapping[str, Any]) -> str:
    speed, parts = record["speed"], []
    if (whole := run_seconds(record)) is not None:
        parts.append(format_seconds(whole))
    if speed["steps_per_second"] is not None:
        parts.append(f"{speed['steps_per_second']:.2f} steps/s")
    calibration = record.get("calibration") or {}
    if "seconds" in calibration:
        parts.append(f"calibration {format_seconds(calibration['seconds'])}")
    elif calibration.get("reused"):
        parts.append("calibration reused from an earlier run")
    return ", ".join(parts)


def _describe_memory(record: Mapping[str, Any]) -> str:
    memory = record["memory"]
    if "allocated_mib" in memory:
        return f"{memory['allocated_mib']:,.0f} MiB at the peak of training"
    if "resident_mib" in memory:
        return f"{memory['resident_mib'] - memory['baseline_mib']:,.0f} MiB above the loaded model"
    return ""


def _describe_trainable(record: Mapping[str, Any]) -> str:
    """The two parts of what trains: MLP weights, and everything else."""
    trainable = record["trainable"]
    if "mlp" not in trainable:
        return f"trainable {trainable['total']:,}"
    mlp = trainable["mlp"]
    share = 100 * mlp["trained"] / mlp["total"]
    return f"MLP weights {mlp['trained']:,} of {mlp['total']:,} ({share:.3g} %), rest {rest_count(trainable):,}"


def rest_count(trainable: Mapping[str, Any]) -> int:
    """Trainable parameters outside the MLP weights, from a record that counts both."""
    return int(trainable["total"]) - int(trainable["mlp"]["trained"])
