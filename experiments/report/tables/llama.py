"""Table 6: LLaMA-2-7B on OASST1, published values next to our runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from experiments.mtbench.scores import ModelScores, compute_scores
from experiments.published import METHODS, cells
from experiments.report.collect import READ, Run
from experiments.report.stats import summarise
from experiments.report.tables.architecture import LLAMA, counts
from experiments.report.tables.base import MINI_MARK, MISSING, Context, Table, hours
from experiments.report.tables.grades import grade
from sparsegrad.tasks.oasst import AUTHORS_COUNTS

Judged = Sequence[ModelScores]
TASK, EXPERIMENT, PROTOCOL = "oasst1", "table6", "paper"  # conf/experiment/table6.yaml
PAPER_MODEL = "llama2_7b"
BLOCKS, RANK, KEPT = 11, 32, 100_000  # conf/model/llama2_7b.yaml: every third block of 32
NOTES = (
    "Ours: loss on the validation split, mean ± sample std over seeds. Models other than LLaMA-2-7B are not the "
    "paper's. The mini runs have 30 steps at one learning rate for all methods, without tuning. They show that each "
    "method trains, but do not rank methods; trainable shares differ.",
    "Trainable share of llama2_7b: computed from the shapes of up and down in 11 blocks. With gate, which the authors' "
    "code trains densely, full is {with_gate} (the paper: 22 %), and the sparse methods gain gate's {gate}. LoRA on "
    "all 32 blocks, as in their code, is {lora_all} (the paper: 0.5 %). 100,000 entries of each weight are "
    "{sparsegrad}.",
    "Judge's score: 1 to 10 on MT-Bench's questions. The published I-Bench is Inflection's set and not comparable.",
    "Steps/s and peak memory of our rows were measured while the machine did other work: they show that a run fits "
    "into memory, but do not rank methods. On a CPU the peak is the resident set, including the loaded model.",
)


def table(context: Context) -> Table:
    """The published rows with our runs of the same, then our runs of other models and of the authors' variant."""
    graded, shares, store = compute_scores(context.results / "mtbench"), paper_shares(), context.store
    found = {key: runs for key, runs in sorted(store.runs.items()) if key[3] == TASK and READ.fullmatch(key[0])}
    rows, records = [], {}
    for row, method in METHODS.items():
        runs = found.get((EXPERIMENT, PAPER_MODEL, method, TASK, PROTOCOL), [])
        ours = _ours(EXPERIMENT, PAPER_MODEL, method, PROTOCOL, runs, context, graded)
        rows.append({**ours, **_published(row), "trainable": ours["trainable"] or shares[method]})
        rows[-1]["difference"] = _difference(runs, context, row)
    for (folder, model, method, _, protocol), runs in found.items():
        if (folder, model, protocol) != (EXPERIMENT, PAPER_MODEL, PROTOCOL) or method not in METHODS.values():
            rows.append(_ours(folder, model, method, protocol, runs, context, graded))
        records[f"{model} {method} {protocol} {folder}"] = [run.path for run in runs]
    notes = [note.format(**shares) for note in NOTES] + _conversations(context, records)
    if not records:
        notes.append("Missing: runs of task oasst1 (LLaMA-2-7B needs its weights and a GPU with 80 GB) and a judge.")
    return Table("table6", "Table 6: LLaMA-2-7B on OASST1", pd.DataFrame(rows), notes, records)


def paper_shares() -> dict[str, str]:
    """Trainable share of LLaMA-2-7B by method as in the paper's text, and for variants of the authors' code."""
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


def _published(row: str) -> dict[str, str]:
    found = cells(6)
    loss, std = found[row, "Valid Loss"]
    return {
        "published loss": f"{loss} ± {std}",
        "published I-Bench": found[row, "I-Bench Score"][0],
        "published trainable": found[row, "#Train params"][0],
    }


def _difference(runs: Sequence[Run], context: Context, row: str) -> str:
    """Ours minus the published loss; empty without runs."""
    found = summarise(_losses(runs, context))
    return "" if found is None else f"{found.mean - float(cells(6)[row, 'Valid Loss'][0]):+.3f}"


def _ours(
    folder: str, model: str, method: str, protocol: str, runs: Sequence[Run], context: Context, graded: Judged
) -> dict[str, str]:
    records = [context.store.records[run.path] for run in runs]
    losses, spent = _losses(runs, context), [run.hours for run in runs if run.hours is not None]
    return {
        "model": model + ("" if model == PAPER_MODEL else f" ({MINI_MARK})"),
        "experiment": folder,
        "method": method,
        "protocol": protocol,
        **dict.fromkeys(("published loss", "published I-Bench", "published trainable"), "none"),
        "trainable": _median_text(records, "trainable", "share", _percent),
        "loss before": _before(records),
        "ours, loss": _format_loss(losses, [run.reason for run in runs if run.reason]),
        "difference": "",
        "n": str(len(losses)),
        **grade(graded, model, method),
        "steps/s": _median_text(records, "speed", "steps_per_second", "{:.2f}".format),
        "peak MiB": _peak(records),
        "hours": hours(sum(spent) if spent else None),
    }


def _format_loss(losses: Sequence[float], reasons: Sequence[str]) -> str:
    """Mean and standard deviation, or the reasons if all runs failed."""
    found = summarise(losses)
    if found is None:
        return "failed: " + "; ".join(sorted(set(reasons))) if reasons else MISSING
    return f"{found.mean:.3f}" + ("" if found.std is None else f" ± {found.std:.3f}")


def _losses(runs: Sequence[Run], context: Context) -> list[float]:
    """One loss per seed; seeds whose records disagree are left out, and the page lists them."""
    by_seed: dict[int, set[float]] = {}
    for run in runs:
        if (loss := _loss(context.store.records[run.path])) is not None:
            by_seed.setdefault(run.seed, set()).add(loss)
    return [values.pop() for _, values in sorted(by_seed.items()) if len(values) == 1]


def _loss(record: dict[str, Any]) -> float | None:
    """The validation loss of the chosen checkpoint: the mean negative log-likelihood per token."""
    result = record["result"] if record["status"] == "complete" else {}
    return float(result["value"]) if result.get("metric") == "nll" else None


def _before(records: Sequence[Mapping[str, Any]]) -> str:
    """The loss before training, averaged over seeds."""
    found = [row["nll"] for record in records for row in record.get("evaluations", []) if row["step"] == 0]
    return f"{sum(found) / len(found):.3f}" if found else ""


def _median_text(records: Sequence[Mapping[str, Any]], group: str, name: str, show: Any) -> str:
    """The median of a field over records, formatted by `show`; empty without values."""
    values = [record[group][name] for record in records if record.get(group, {}).get(name) is not None]
    return show(median(values)) if values else ""


def _peak(records: Sequence[Mapping[str, Any]]) -> str:
    """Median peak memory: allocated on a GPU, resident on a CPU."""
    gpu = _median_text(records, "memory", "allocated_mib", "{:,.0f}".format)
    return gpu or _median_text(records, "memory", "resident_mib", "{:,.0f}".format)


def _conversations(context: Context, records: Mapping[str, Sequence[Path]]) -> list[str]:
    """A note with the numbers of conversations, the authors' and ours."""
    found = {
        tuple(data["counts"][f"{part}_conversations"] for part in AUTHORS_COUNTS)
        for paths in records.values()
        for path in paths
        if (data := context.store.records[path].get("data", {})).get("counts")
    }
    theirs = " / ".join(f"{count:,}" for count in AUTHORS_COUNTS.values())
    ours = "; ".join(f"{train:,} / {validation:,}" for train, validation in sorted(found))
    return [f"Conversations, train / validation: the authors' {theirs}; ours {ours}."] if found else []
