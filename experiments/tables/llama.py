"""Table 6: LLaMA-2-7B on OASST1; what is published, and what of ours is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from experiments.collect import Run
from experiments.mtbench.scores import ModelScores, scores
from experiments.published import METHODS, cells
from experiments.stats import summarise
from experiments.tables.architecture import LLAMA, counts
from experiments.tables.base import MINI_MARK, MISSING, Context, Table, hours
from experiments.tables.grades import grade
from sparsegrad.tasks.oasst import AUTHORS_COUNTS

TASK = "oasst1"
PAPER_MODEL = "llama2_7b"
BLOCKS, RANK, KEPT = 11, 32, 100_000  # conf/model/llama2_7b.yaml: every third block of 32
NOTES = (
    "Our rows: loss on the validation split, by model; models other than LLaMA-2-7B are not the paper's model.",
    "Trainable of llama2_7b is computed from the shapes: up and down of 11 blocks. With gate, which the authors' code "
    "trains densely, full is {with_gate}, the paper's 22 %, and the sparse methods add gate's {gate}; LoRA on all 32 "
    "blocks, as in their code, is {lora_all}, the paper's 0.5 %; 100,000 entries of each weight are {sparsegrad}.",
    "Judge's score: MT-Bench's questions, 1 to 10; the published I-Bench is Inflection's set: not to be compared.",
    "Steps/s and peak memory of our rows were taken beside other work on the same machine: they show that a run fits, "
    "and rank nothing. On a CPU the peak is the resident set, loaded model included.",
)


def table(context: Context) -> Table:
    """Published cells, and the validation loss of our runs of any model on OASST1, by model."""
    graded = scores(context.results / "mtbench")
    shares = paper_shares()
    rows = [_published(row, method, graded, shares) for row, method in METHODS.items()]
    records: dict[str, list[Path]] = {}
    for (folder, model, method, task, protocol), runs in sorted(context.store.runs.items()):
        if task == TASK:
            rows.append(_ours(model, method, runs, context, graded))
            records[f"{model} {method} {protocol} {folder}"] = [run.path for run in runs]
    notes = [note.format(**shares) for note in NOTES] + _conversations(context, records)
    if not records:
        notes.append("Missing: runs of task oasst1 (LLaMA-2-7B needs its weights and a GPU of 80 GB) and the judge.")
    return Table("table6", "Table 6: LLaMA-2-7B on OASST1", pd.DataFrame(rows), notes, records)


def paper_shares() -> dict[str, str]:
    """Trainable share of LLaMA-2-7B by method, under the paper's text, and of its authors' variants."""
    sizes: dict[str, Any] = dict(LLAMA)
    wide, narrow = sizes["intermediate_size"], sizes["hidden_size"]
    weight, adapter = wide * narrow, RANK * (wide + narrow)
    sparse = 2 * BLOCKS * KEPT
    entries = {
        "full": 2 * BLOCKS * weight,
        "lora": 2 * BLOCKS * adapter,
        "sparsegrad": sparse,
        "meprop": sparse,
        "with_gate": 3 * BLOCKS * weight,
        "gate": BLOCKS * weight,
        "lora_all": 2 * sizes["num_hidden_layers"] * adapter,
    }
    total = sum(counts("llama").values())
    return {name: _percent(number / total) for name, number in entries.items()}


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _published(row: str, method: str, graded: Sequence[ModelScores], shares: Mapping[str, str]) -> dict[str, str]:
    found = cells(6)
    loss, std = found[row, "Valid Loss"]
    return {
        "model": PAPER_MODEL,
        "method": method,
        "published loss": f"{loss} ± {std}",
        "published I-Bench": found[row, "I-Bench Score"][0],
        "published trainable": found[row, "#Train params"][0],
        "trainable": shares[method],
        "loss before": "",
        "ours, loss": MISSING,
        "n": "0",
        **grade(graded, PAPER_MODEL, method),
        "steps/s": "",
        "peak MiB": "",
        "hours": "",
    }


def _ours(model: str, method: str, runs: list[Run], context: Context, graded: Sequence[ModelScores]) -> dict[str, str]:
    records = [context.store.records[run.path] for run in runs]
    losses = [loss for record in records if (loss := _loss(record)) is not None]
    found, spent = summarise(losses), [run.hours for run in runs if run.hours is not None]
    shown = MISSING if found is None else f"{found.mean:.3f}" + ("" if found.std is None else f" ± {found.std:.3f}")
    mark = "" if model == PAPER_MODEL else f" ({MINI_MARK})"
    return {
        "model": model + mark,
        "method": method,
        **dict.fromkeys(("published loss", "published I-Bench", "published trainable"), "none"),
        "trainable": _middle(records, "trainable", "share", _percent),
        "loss before": _before(records),
        "ours, loss": shown,
        "n": str(len(losses)),
        **grade(graded, model, method),
        "steps/s": _middle(records, "speed", "steps_per_second", "{:.2f}".format),
        "peak MiB": _peak(records),
        "hours": hours(sum(spent) if spent else None),
    }


def _loss(record: dict[str, Any]) -> float | None:
    """The validation loss of the chosen checkpoint: the mean negative log-likelihood per token."""
    result = record["result"] if record["status"] == "complete" else {}
    return float(result["value"]) if result.get("metric") == "nll" else None


def _before(records: Sequence[Mapping[str, Any]]) -> str:
    """The loss of the untrained model, the same for all seeds; their mean."""
    found = [row["nll"] for record in records for row in record.get("evaluations", []) if row["step"] == 0]
    return f"{sum(found) / len(found):.3f}" if found else ""


def _middle(records: Sequence[Mapping[str, Any]], group: str, name: str, show: Any) -> str:
    values = [record[group][name] for record in records if record.get(group, {}).get(name) is not None]
    return show(median(values)) if values else ""


def _peak(records: Sequence[Mapping[str, Any]]) -> str:
    """Median peak: CUDA's allocated memory, or the resident set of a CPU."""
    gpu = _middle(records, "memory", "allocated_mib", "{:,.0f}".format)
    return gpu or _middle(records, "memory", "resident_mib", "{:,.0f}".format)


def _conversations(context: Context, records: Mapping[str, Sequence[Path]]) -> list[str]:
    """The counts of our data beside the authors'."""
    found = {
        tuple(data["counts"][f"{part}_conversations"] for part in AUTHORS_COUNTS)
        for paths in records.values()
        for path in paths
        if (data := context.store.records[path].get("data", {})).get("counts")
    }
    theirs = " / ".join(f"{count:,}" for count in AUTHORS_COUNTS.values())
    ours = "; ".join(f"{train:,} / {validation:,}" for train, validation in sorted(found))
    return [f"Conversations, train / validation: the authors' {theirs}; ours {ours}."] if found else []
