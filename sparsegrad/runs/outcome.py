"""The content of a record: what a run is, what came of it, and how it failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsegrad.distributed import is_main, world_size
from sparsegrad.errors import DIVERGED, FailedRunError, ResourceError, UserError
from sparsegrad.files import write_json
from sparsegrad.methods.base import Prepared
from sparsegrad.models.loading import describe_tokenizer
from sparsegrad.models.source import Sources
from sparsegrad.runs.config import RunConfig, TrainConfig
from sparsegrad.runs.parts import Parts
from sparsegrad.runs.predictions import Arrays, make_arrays
from sparsegrad.runs.records import SCHEMA, find_complete
from sparsegrad.runs.run_folder import delete_own_checkpoints
from sparsegrad.runs.tokenized_splits import TokenSets
from sparsegrad.tasks.base import Splits
from sparsegrad.trainer.callbacks import NonFiniteLossError
from sparsegrad.trainer.checkpoints import weights_fingerprint
from sparsegrad.trainer.log_history import best_on_validation, evaluations, history, scores_of
from sparsegrad.trainer.trainer import RunTrainer


def describe_run(
    config: RunConfig,
    parts: Parts,
    splits: Splits,
    sources: Sources,
    prepared: Prepared,
    labels: Mapping[str, Any],
) -> dict[str, Any]:
    """The part of a record that is known before training; its status is `failed` until the run is complete."""
    return {
        "schema": SCHEMA,
        "key": config.key,
        "status": "failed",
        **labels,
        "config": _hide_place(config.resolved),
        "source": {**sources.as_json(), "vocabulary": describe_tokenizer(parts.tokenizer)},
        "batch": _describe_batch(config.train),
        "data": _describe_data(splits, parts.sets),
        "trainable": _describe_trainable(parts, prepared),
        "calibration": prepared.calibration,
        **({"method": prepared.notes} if prepared.notes else {}),
    }


def _hide_place(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the name of the data folder only: records are shared, and the path is this machine's."""
    data = dict(resolved["data"])
    if data.get("dir"):
        data["dir"] = Path(data["dir"]).name
    return {**resolved, "data": data}


def _describe_batch(train: TrainConfig) -> dict[str, int]:
    return {
        "per_process": train.batch_size,
        "accumulation": train.grad_accumulation,
        "processes": world_size(),
        "global": train.batch_size * train.grad_accumulation * world_size(),
    }


def _describe_data(splits: Splits, sets: TokenSets) -> dict[str, Any]:
    return {
        "fingerprint": splits.fingerprint,
        "train_rows": len(sets.train),
        "choose_rows": len(sets.choose),
        "validation_rows": len(splits.validation),
        **({"counts": {**splits.counts, **sets.counts}} if sets.counts else {}),
    }


def _describe_trainable(parts: Parts, prepared: Prepared) -> dict[str, Any]:
    """What trains of the model, and of its MLP weights alone."""
    per_weight = prepared.trainable_per_weight
    return {
        "total": prepared.trainable,
        "per_weight": per_weight,
        "model": parts.size,
        "share": round(prepared.trainable / parts.size, 6),
        "mlp": {
            "trained": sum(each * len(parts.linears[kind]) for kind, each in per_weight.items()),
            "total": parts.mlp_size,
        },
    }


def score_run(config: RunConfig, trainer: RunTrainer, parts: Parts) -> tuple[dict[str, Any], Arrays]:
    """The `result` of a record, and the predictions on the validation rows.

    Both are of the best checkpoint, which is the model when training has ended.

    Raises:
        FailedRunError: if no evaluation has a score, so that none is the best.
    """
    main, state = config.task.main_metric, trainer.state
    chosen = next((row for row in evaluations(state.log_history) if row["step"] == state.best_global_step), None)
    if chosen is None:
        raise FailedRunError(
            f"{main} is undefined in every evaluation, as a correlation with constant predictions is: no checkpoint "
            f"can be chosen; change train.lr={config.train.lr:g}, or train longer"
        )
    scores = {name: value for name, value in chosen.items() if name not in ("step", "epoch", "loss")}
    if parts.sets.report is None:
        predicted = trainer.predict_best()
    else:
        # Not `evaluate`: its log would put this split's scores among those that choose.
        predicted = trainer.predict(parts.sets.report, metric_key_prefix="eval")
        scores = scores_of(predicted.metrics)
        scores.pop("loss")
    result = {
        "metric": main,
        "value": scores[main],
        "split": "validation",
        "scores": scores,
        "chosen_on": config.protocol.select,
        "chosen_step": state.best_global_step,
        "chosen_score": state.best_metric,
        "steps": state.global_step,
        "epochs": round(state.epoch, 4),
        "weights": weights_fingerprint(parts.model),
        **best_on_validation(state.log_history, config.task),
    }
    rows = trainer.visited_rows(parts.sets.choose if parts.sets.report is None else parts.sets.report)
    return result, make_arrays(config.task, predicted.predictions, predicted.label_ids, rows)


def write_failed(
    config: RunConfig, record: dict[str, Any], trainer: RunTrainer, environment: dict[str, Any], error: Exception
) -> UserError:
    """Write the record of a run that failed while it trained; the error for the user, which the caller raises.

    A complete record, which `force=true` was to replace, stays. After a `FailedRunError` checkpoints are deleted: they
    lead there again. After any other error they are kept: the next try continues from them.
    """
    reason = str(error)
    if isinstance(error, NonFiniteLossError):
        reason = f"{error}: training {DIVERGED}; lower train.lr={config.train.lr:g}, or check the data"
    failure = FailedRunError if isinstance(error, FailedRunError) else UserError
    if not is_main():  # the main one may not fail, or not here: then there is no record
        return failure(reason)
    if config.force and _has_complete(config.record_path):
        note = f"the complete record {config.record_path} is kept"
    else:
        note = f"record {config.record_path}, marked failed"
        rest = {"reason": reason, "environment": environment}
        write_json(config.record_path, {**record, **history(trainer.state.log_history), **rest})
    if isinstance(error, FailedRunError):
        delete_own_checkpoints(config)
    return failure(f"{reason} ({note})")


def _has_complete(path: Path) -> bool:
    try:
        return find_complete(path) is not None
    except UserError as error:
        return isinstance(error, ResourceError)  # a damaged record is replaced, not one that the disk holds back
