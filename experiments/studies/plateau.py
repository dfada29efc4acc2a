"""Train variants of the engines until their scores stop rising, and compare the scores on STS-B.

The model is MiniLM; only its MLP weights and head train, for four epochs at a constant rate under bfloat16 autocast.
In this regime, and in runs of this length, methods can differ most (docs/evidence.md). A tenth of the training rows is
held out, and the score on it chooses the step; the result is the Pearson correlation on the validation split at that
step. Each result is added to `results/plateau_study.json` immediately, and results that exist are not computed again.

    python -m experiments.studies.plateau --glue <glue folder> --arms exact exact_static --rates 5e-4 --seeds 2 3
    python -m experiments.studies.plateau --glue <glue folder> --arms fast lora --batches 8 32 128 256 --rates 1e-3

Arms named `.._renewed` calibrate again after each epoch and restart with empty moments. Arms named `.._restarted` also
restart, but keep their bases, so that only the bases differ between the two.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from scipy.stats import pearsonr
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experiments.studies.engines import lora as make_lora
from sparsegrad import prepare
from sparsegrad.assets.download import asset_path
from sparsegrad.basis import Basis
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.files import write_json
from sparsegrad.methods.base import kept_per_weight
from sparsegrad.methods.static_mask import fix_positions
from sparsegrad.targets import find_mlp
from sparsegrad.trainer.bfloat16 import fast_bfloat16

EPOCHS, EVALUATIONS, CALIBRATION, BATCH = 4, 12, 30, 32
Batch = dict[str, Tensor]
Bases = dict[str, Basis]
Arm = Callable[[nn.Module, Bases, float, Sequence[Batch]], torch.optim.Optimizer]


def sparsegrad(
    model: nn.Module, bases: Bases, lr: float, batches: Sequence[Batch], **options: Any
) -> torch.optim.Optimizer:
    """`sparsegrad.prepare` with options of its own."""
    return prepare(model, None, lr=lr, bases=bases, **options)


def static(
    model: nn.Module, bases: Bases, lr: float, batches: Sequence[Batch], **options: Any
) -> torch.optim.Optimizer:
    """Support chosen by the mean squared rotated gradient of the calibration batches (SPEFT, arXiv 2412.13488)."""
    optimizer = prepare(model, None, lr=lr, bases=bases, **options)
    linears = find_mlp(model, None)
    named = {name: linear.weight for found in linears.values() for name, linear in found.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in named.items()}
    for batch in batches:
        model(**batch).loss.backward()
        for name, weight in named.items():  # rotated: its linear computes V^T G U
            squares[name] += weight.grad.square()  # type: ignore[union-attr]
        model.zero_grad()
    fix_positions(optimizer, linears, squares, kept_per_weight(linears, 0.01, None))
    return optimizer


def lora(model: nn.Module, bases: Bases, lr: float, batches: Sequence[Batch]) -> torch.optim.Optimizer:
    """peft's LoRA of the same trainable count, alpha = 2 rank."""
    return make_lora(model, find_mlp(model, None), bases, lr)


ARMS: dict[str, Arm] = {
    "exact": sparsegrad,
    "exact_static": static,
    "exact_restarted": sparsegrad,
    "exact_renewed": sparsegrad,
    "small": partial(sparsegrad, sides="small"),
    "small_static": partial(static, sides="small"),
    "small_support": partial(sparsegrad, sides="small", moments="support"),
    "fast": partial(sparsegrad, engine="fast"),
    "lora": lora,
}


def run_one(arm: str, lr: float, seed: int, batch: int, glue: Path) -> dict[str, Any]:
    """One training run: score at the step that the held-out rows choose, that step, and all held-out scores."""
    torch.manual_seed(seed)
    folder = asset_path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    train, held, validation = _read_rows(glue / "stsb")
    batches = list(_batches(tokenizer, train, batch, seed))
    optimizer, step, chosen = _start(arm, model, lr, tokenizer, train, seed), 0, (-1.0, 0)
    every, epoch = max(1, len(batches) // EVALUATIONS), len(batches) // EPOCHS
    curve, best = [], copy.deepcopy(model.state_dict())
    for step, rows in enumerate(batches, 1):
        _train_step(model, optimizer, rows)
        if step % epoch == 0 and step < len(batches) and arm.endswith(("_restarted", "_renewed")):
            optimizer = _restart(arm, model, optimizer, lr, tokenizer, train, seed + step)
        if step % every == 0:
            score = _score(model, tokenizer, held)
            curve.append(round(score, 4))
            if score > chosen[0]:
                chosen, best = (score, step), copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return {"score": _score(model, tokenizer, validation), "step": chosen[1], "held_out": curve}


def _start(arm: str, model: nn.Module, lr: float, tokenizer: Any, rows: list[Any], seed: int) -> torch.optim.Optimizer:
    batches = _calibration_batches(tokenizer, rows, seed)
    bases = _calibrate(model, batches)
    linears = find_mlp(model, None)
    weights = {id(linear.weight) for found in linears.values() for linear in found.values()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in weights or name.startswith("classifier"))
    return ARMS[arm](model, bases, lr, batches)


def _restart(
    arm: str, model: nn.Module, before: Any, lr: float, tokenizer: Any, rows: list[Any], seed: int
) -> torch.optim.Optimizer:
    """The optimizer with empty moments: with its own bases, or with new ones."""
    bases = before.bases
    if arm.endswith("_renewed"):
        bases = _calibrate(model, _calibration_batches(tokenizer, rows, seed))
    return ARMS[arm](model, bases, lr, [])


def _calibrate(model: nn.Module, batches: Sequence[Batch]) -> Bases:
    kinds = {kind: list(found.values()) for kind, found in find_mlp(model, None).items()}
    return calibrate(model, batches, kinds, len(batches))


def _calibration_batches(tokenizer: Any, rows: list[Any], seed: int) -> list[Batch]:
    return list(_batches(tokenizer, rows, BATCH, seed + 1000, epochs=1))[:CALIBRATION]


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    model.train()
    with fast_bfloat16(torch.device("cpu")):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _read_rows(folder: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """Training rows, a held-out tenth of them that is the same for all runs, and the validation rows."""
    train, validation = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "validation")
    )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held = set(order[: len(train) // 10])
    split = [[row for number, row in enumerate(train) if (number in held) is wanted] for wanted in (False, True)]
    return split[0], split[1], validation


def _batches(tokenizer: Any, rows: list[Any], size: int, seed: int, epochs: int = EPOCHS) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield _tensors(tokenizer, [rows[number] for number in order[start : start + size]])


def _tensors(tokenizer: Any, rows: Iterable[Mapping[str, Any]]) -> Batch:
    rows = list(rows)
    pairs = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    found = tokenizer(*pairs, return_tensors="pt", padding=True, truncation=True, max_length=128)
    return {**found, "labels": torch.tensor([float(row["label"]) for row in rows])}


@torch.no_grad()
def _score(model: nn.Module, tokenizer: Any, rows: list[Any]) -> float:
    """Pearson correlation on rows, which are sorted by length to save padding."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row["sentence1"]) + len(row["sentence2"]))
    found: list[float] = []
    for start in range(0, len(rows), 64):
        with fast_bfloat16(torch.device("cpu")), torch.autocast("cpu", torch.bfloat16):
            found += model(**_tensors(tokenizer, rows[start : start + 64])).logits.flatten().float().tolist()
    score = float(pearsonr(found, [row["label"] for row in rows]).statistic)
    return score if math.isfinite(score) else -1.0


def main() -> None:
    """The command line: run the missing combinations of arms, batch sizes, rates and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path, required=True, help="folder with stsb/train.jsonl")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--batches", nargs="+", type=int, default=[BATCH])
    parser.add_argument("--out", type=Path, default=Path("results/plateau_study.json"))
    asked = parser.parse_args()
    cells = [
        {"arm": arm, "lr": lr, "seed": seed, "batch": batch}
        for seed in asked.seeds
        for batch in asked.batches
        for lr in asked.rates
        for arm in asked.arms
    ]
    for cell in cells:
        _run_missing(asked.out, cell, asked.glue)


def _run_missing(out: Path, cell: dict[str, Any], glue: Path) -> None:
    if any(all(row[name] == value for name, value in cell.items()) for row in _rows(out)):
        return
    row = {**cell, **run_one(**cell, glue=glue)}
    row["score"] = round(row["score"], 4)
    with FileLock(f"{out}.lock"):  # another process may add rows
        write_json(out, {"rows": [*_rows(out), row]})
    print(json.dumps(row), flush=True)


def _rows(out: Path) -> list[dict[str, Any]]:
    return json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []


if __name__ == "__main__":
    main()
