"""Synthetic evidence runs: records with predictions, of a plan in a folder of their own."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiments.report import evidence
from experiments.report.plans import EvidencePlan, read_plan
from sparsegrad.files import read_json, write_json
from sparsegrad.runs.plan import plan_hash
from sparsegrad.runs.predictions import describe_arrays, write_predictions

SEEDS = (42, 3705, 2023)
ROWS = 300
RULES: dict[str, Any] = {
    "gates": {"sst2": 60, "mrpc": 60},
    "budget": 8,
    "regime": "paper",
    "seeds": list(SEEDS),
    "reference": "lora_tuned",
}


def draw_predictions(accuracy: float, seed: int) -> dict[str, Any]:
    """Predictions and labels of `ROWS` rows; rows that are hard are hard for every seed."""
    label = np.random.default_rng(0).integers(0, 2, ROWS).astype(np.uint8)
    hard = np.random.default_rng(1).random(ROWS) + 0.2 * np.random.default_rng(seed).random(ROWS)
    wrong = np.argsort(hard)[round(accuracy * ROWS) :]
    predicted = label.copy()
    predicted[wrong] = 1 - label[wrong]
    return {"predicted": predicted, "label": label}


class Cases:
    """Writes plans and runs below a folder."""

    def __init__(self, root: Path) -> None:
        self.results, self.conf = root / "results", root / "conf"

    def plan(self, name: str = "evidence_paper", rules: dict[str, Any] | None = None, **more: Any) -> None:
        """Write a plan's YAML."""
        grid = more.pop("grid", {"task": "sst2,mrpc", "seed": "42,3705,2023", "method": "full,lora_tuned,sparsegrad"})
        content = {"name": name, "evidence": {**RULES, **(rules or {})}, "hydra": {"sweeper": {"params": grid}}, **more}
        path = self.conf / "experiment" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))

    def run(
        self, method: str, task: str, seed: int, accuracy: float, *, folder: str = "evidence_paper", **more: Any
    ) -> Path:
        """Write one run whose predictions have about this accuracy, between 0 and 1."""
        arrays = draw_predictions(accuracy, seed + zlib.crc32(method.encode()))
        if more.pop("constant", False):
            arrays["predicted"][:] = 1
        path = self.results / "runs" / folder / f"{more.pop('name', f'{method}-{task}-{seed}')}.json"
        experiment = more.pop("experiment", folder)
        plan = {"experiment": experiment, "sha256": plan_hash(self.conf / "experiment" / f"{experiment}.yaml")}
        value = float((arrays["predicted"] == arrays["label"]).mean())
        steps = more.pop("steps", ((10, value - 0.1), (20, value), (30, value - 0.02)))
        best = max(steps, key=lambda row: row[1])
        record = {
            "schema": 1,
            "key": path.stem,
            "status": "complete",
            "plan": plan,
            "hparams": {"from": "search", "study": f"evidence-minilm-{method}-{task}"},
            "config": {
                "model": {"name": more.pop("model", "minilm")},
                "method": {"name": method, **more.pop("options", {})},
                "task": {"name": task, "main_metric": "accuracy"},
                "protocol": {"name": "heldout"},
                "train": {"lr": 1e-4, "batch_size": 32, "train_rest": True},
                "seed": seed,
            },
            "data": {"fingerprint": more.pop("fingerprint", f"data-{task}")},
            "result": {"metric": "accuracy", "value": value, "steps": 30, "chosen_step": best[0]},
            "evaluations": [{"step": step, "accuracy": score} for step, score in steps],
            "speed": {"steps_per_second": 0.1},
            "predictions": describe_arrays(arrays),
            "environment": {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:15:00+00:00"},
            **more,
        }
        write_json(path, record)
        write_predictions(path, arrays)
        return path

    def loss(self, method: str, seed: int, nll: float, *, folder: str) -> Path:
        """Write one run of a language model whose mean loss per token is `nll`."""
        path = self.run(method, "oasst1", seed, 0.5, folder=folder)
        rows = np.random.default_rng(3).normal(0, 0.1, ROWS) + np.random.default_rng(seed).normal(0, 0.02, ROWS)
        arrays = {"nll": (10 * (nll + rows - rows.mean())).astype(np.float32), "tokens": np.full(ROWS, 10, np.uint16)}
        write_predictions(path, arrays)
        record = read_json(path)
        record["result"] |= {"metric": "nll", "value": nll}
        record["evaluations"] = [{"step": step, "nll": nll + 0.1} for step in (10, 20)]
        write_json(path, {**record, "predictions": describe_arrays(arrays)})
        return path

    def study(self, method: str, task: str, trials: int = 8) -> None:
        """Write the summary of a search."""
        name = f"evidence-minilm-{method}-{task}"
        best = {"value": 0.8, "values": {"train.lr": 1e-4}}
        counts = {"complete": trials - 2, "pruned": 2}
        about = {"study": name, "best": best, "trials": counts, "seconds": 1800.0, "metric": "accuracy"}
        labels = {"model": "minilm", "method": method, "task": task}
        more = {"objective": "heldout", "labels": labels}
        write_json(self.results / "studies" / name / "summary.json", {**about, **more})

    def healthy(self, gain: float = 0.06) -> None:
        """Three arms with three seeds on two tasks; sparsegrad is better than lora_tuned by `gain`."""
        self.plan()
        for task in ("sst2", "mrpc"):
            for arm, accuracy in (("full", 0.85), ("lora_tuned", 0.80), ("sparsegrad", 0.80 + gain)):
                self.study(arm, task)
                for number, seed in enumerate(SEEDS):
                    self.run(arm, task, seed, accuracy + 0.004 * (number - 1))


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cases:
    """An empty results folder, and plans of its own."""
    made = Cases(tmp_path)

    def read(name: str) -> EvidencePlan | None:
        return read_plan(name, made.conf)

    monkeypatch.setattr(evidence, "read_plan", read)
    (made.results / "runs").mkdir(parents=True)
    return made
