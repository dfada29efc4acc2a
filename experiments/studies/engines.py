"""Compare how well engines learn, each at several learning rates: mean training loss over 200 steps.

The model is MiniLM on SST-2 at batch size 16. Only the MLP weights and the classifier train, at a constant rate;
calibration uses 30 other batches. Engines have the same trainable count (1 % of each MLP weight) unless an arm's name
says otherwise. Each result is added to `results/engine_study.json` immediately, and results that exist are not computed
again. Arms named `.._renewed` calibrate again after half of the steps and restart with empty moments. Arms named
`.._restarted` also restart, but keep their bases, so that only the bases differ between the two.

    python -m experiments.studies.engines --glue <glue folder> --arms exact fast lora --rates 5e-4 1e-3 --seeds 2 3
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparsegrad.assets.download import asset_path
from sparsegrad.basis import Basis
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.files import write_json
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.common import core_shape
from sparsegrad.layers.replace import replace_linear, to_linears
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.groups import param_groups
from sparsegrad.optim.selection import Selection, count_kept
from sparsegrad.targets import Linears, find_mlp

CALIBRATION, STEPS, BATCH = 30, 200, 16
Batches = list[dict[str, torch.Tensor]]
Bases = dict[str, Basis]
Arm = Callable[[nn.Module, Linears, Bases, float], torch.optim.Optimizer]


def exact(model: nn.Module, linears: Linears, bases: Bases, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Engine exact with `sides`, `moments`, `density`; sides=None: no rotation, which is MeProp with masked Adam."""
    sides, density = options.get("sides", "both"), options.get("density", 0.01)
    chosen = {kind: None if sides is None else basis.only(sides) for kind, basis in bases.items()}
    groups = param_groups(model, linears, chosen, density=density, moments=options.get("moments", "dense"))
    return SparseGradAdamW(groups, lr=lr)


class HeldSupport(SparseGradAdamW):
    """Engine exact that selects its kept entries only every `interval` steps; it stores the moments of all entries."""

    interval = STEPS

    def _update(self, selections: list[Selection]) -> None:
        super()._update([self._hold_selection(selection) for selection in selections])

    def _hold_selection(self, selection: Selection) -> Selection:
        state = self.state[selection.weights[0]]
        age = state["age"] = state.get("age", -1) + 1
        if age % self.interval == 0:
            state["held"] = selection.index
        gradients = torch.stack([weight.grad for weight in selection.weights if weight.grad is not None])
        # (weights, out, in) rotated and flattened, then the values at the held positions
        values = selection.group["basis"].rotate(gradients).flatten(1).gather(1, state["held"])
        return Selection(selection.group, selection.weights, state["held"], values, selection.basis)


def held(model: nn.Module, linears: Linears, bases: Bases, lr: float, interval: int) -> torch.optim.Optimizer:
    """Engine exact whose kept entries are selected every `interval` steps."""
    optimizer = HeldSupport(param_groups(model, linears, bases, density=0.01), lr=lr)
    optimizer.interval = interval
    return optimizer


def block_top(model: nn.Module, linears: Linears, bases: Bases, lr: float, share: float) -> torch.optim.Optimizer:
    """Engine fast with a larger core, of which each step trains the largest entries: 1 % of the weight."""
    block(model, linears, bases, lr, shape=lambda *shape: core_shape(shape, share))
    trained = [p for p in model.parameters() if p.requires_grad]
    cores = {layer.core for layer in model.modules() if isinstance(layer, BlockLinear)}
    groups = [
        {"params": [p for p in trained if p in cores], "density": 0.01 / share},
        {"params": [p for p in trained if p not in cores]},
    ]
    return SparseGradAdamW(groups, lr=lr)


def block(model: nn.Module, linears: Linears, bases: Bases, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Engine fast; `shape` maps a weight's shape (out, in) to the core's (c, r)."""
    for kind, found in linears.items():
        for name, linear in found.items():
            core = options["shape"](*linear.weight.shape)
            replace_linear(model, name, linear, BlockLinear.from_linear(linear, bases[kind], core))
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def lora(model: nn.Module, linears: Linears, bases: Bases, lr: float) -> torch.optim.Optimizer:
    """peft's LoRA on the MLP linears at the same trainable count, with alpha = 2 rank."""
    from peft import LoraConfig, inject_adapter_in_model

    out, features = next(iter(next(iter(linears.values())).values())).weight.shape
    rank = max(1, round(count_kept((out, features), density=0.01) / (out + features)))
    names = [name for found in linears.values() for name in found]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("classifier"))
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def _proportional(out: int, features: int) -> tuple[int, int]:
    return core_shape((out, features), 0.01)


def _narrow(out: int, features: int) -> tuple[int, int]:
    """The same side lengths, the longer one along the outputs: only the inputs' side adds to the cost of a step."""
    small, large = sorted(_proportional(out, features))
    return large, small


def _crossed(share: float) -> Callable[[int, int], tuple[int, int]]:
    """c proportional to the inputs and r to the outputs, which needs the fewest multiplications."""
    return lambda out, features: (min(out, round(share * features)), min(features, round(share * out)))


ARMS: dict[str, Arm] = {
    "exact": exact,
    "exact_small_side": partial(exact, sides="small"),
    "exact_small_side_support": partial(exact, sides="small", moments="support"),
    "meprop_masked": partial(exact, sides=None),
    "lora": lora,
    "block_proportional": partial(block, shape=_proportional),
    "block_narrow": partial(block, shape=_narrow),
    "block_crossed": partial(block, shape=_crossed(0.1)),
    "exact_support_50": partial(held, interval=50),
    "exact_support_fixed": partial(held, interval=STEPS),
    "block_4_percent_top": partial(block_top, share=0.04),
    "exact_restarted": exact,
    "exact_renewed": exact,
    "block_restarted": partial(block, shape=_proportional),
    "block_renewed": partial(block, shape=_proportional),
}


def run_one(arm: str, lr: float, seed: int, glue: Path) -> dict[str, float]:
    """One training run: mean loss of all steps and of the last 50, and accuracy on the validation split."""
    torch.manual_seed(seed)
    folder = asset_path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    linears = _trained_linears(model)
    batches = _batches(tokenizer, glue / "sst2" / "train.jsonl", seed)
    bases = _calibrate(model, linears, batches)
    halves = 2 if arm.endswith(("_restarted", "_renewed")) else 1
    losses: list[float] = []
    for half in range(halves):
        if half:
            if arm.startswith("block"):  # merge the trained cores into plain linears, for calibration
                to_linears(model)
                linears = _trained_linears(model)
            renewed = _calibrate(model, linears, batches)  # in both arms, so that both train on the same batches
            bases = renewed if arm.endswith("_renewed") else bases
        optimizer = ARMS[arm](model, linears, bases, lr)
        losses += _train(model, optimizer, batches, STEPS // halves)
    return {
        "loss": sum(losses) / len(losses),
        "last_50": sum(losses[-50:]) / 50,
        "accuracy": _accuracy(model, tokenizer, glue / "sst2" / "validation.jsonl"),
    }


def _trained_linears(model: nn.Module) -> Linears:
    """The MLP linears; sets `requires_grad` so that only their weights and the classifier train."""
    linears = find_mlp(model, None)
    weights = {id(linear.weight) for found in linears.values() for linear in found.values()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in weights or name.startswith("classifier"))
    return linears


def _calibrate(model: nn.Module, linears: Linears, batches: Iterator[dict[str, torch.Tensor]]) -> Bases:
    return calibrate(model, batches, {kind: list(found.values()) for kind, found in linears.items()}, CALIBRATION)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Mapping[str, Any]], steps: int
) -> Iterator[float]:
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def _batches(tokenizer: Any, path: Path, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), BATCH):
        yield _tensors(tokenizer, [rows[number] for number in order[start : start + BATCH]])


def _tensors(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    texts = [row["sentence"] for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
    return {**batch, "labels": torch.tensor([row["label"] for row in rows])}


@torch.no_grad()
def _accuracy(model: nn.Module, tokenizer: Any, path: Path) -> float:
    model.eval()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = 0
    for start in range(0, len(rows), 64):
        batch = _tensors(tokenizer, rows[start : start + 64])
        right += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
    return right / len(rows)


def main() -> None:
    """The command line: run the missing combinations of arms, rates and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path, required=True, help="folder with sst2/train.jsonl")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--out", type=Path, default=Path("results/engine_study.json"))
    asked = parser.parse_args()
    for seed in asked.seeds:
        for lr in asked.rates:
            for arm in asked.arms:
                _run_missing(asked.out, arm, lr, seed, asked.glue)


def _run_missing(out: Path, arm: str, lr: float, seed: int, glue: Path) -> None:
    known = _rows(out)
    if any((row["arm"], row["lr"], row["seed"]) == (arm, lr, seed) for row in known):
        return
    result = run_one(arm, lr, seed, glue)
    finite = {name: round(value, 4) if math.isfinite(value) else None for name, value in result.items()}
    row = {"arm": arm, "lr": lr, "seed": seed, **finite}
    with FileLock(f"{out}.lock"):  # another process may add rows
        write_json(out, {"rows": [*_rows(out), row]})
    print(json.dumps(row), flush=True)


def _rows(out: Path) -> list[dict[str, Any]]:
    return json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []


if __name__ == "__main__":
    main()
