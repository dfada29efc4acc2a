"""The Trainer of transformers continues a SparseGrad run from its checkpoint, as docs/recipes.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fast_checks import BATCHES
from model_states import assert_equal

from sparsegrad import load_bases, prepare, save_bases

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from model_zoo import tiny_model
from transformers import Trainer, TrainingArguments

LR, ROWS = 1e-3, [{name: values[row] for name, values in BATCHES[0].items()} for row in range(4)]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    """Its bases come from a file: nothing is calibrated again, on weights that have moved."""
    bases = tmp_path / "bases.safetensors"
    whole = _train(tmp_path / "whole", 4)
    _train(tmp_path / "stopped", 2, bases)
    model = tiny_model("bert", torch.float32)
    trainer = _make_trainer(model, tmp_path / "stopped", 4)
    trainer.optimizer = prepare(model, None, bases=load_bases(bases), lr=LR)
    trainer.train(resume_from_checkpoint=True)
    assert_equal(whole.state_dict(), model.state_dict())


def _train(folder: Path, steps: int, bases: Path | None = None) -> Any:
    """The model after `steps` steps from its start, with the bases of its calibration stored in a file."""
    model = tiny_model("bert", torch.float32)
    trainer = _make_trainer(model, folder, steps)
    trainer.optimizer = prepare(model, trainer.get_train_dataloader(), calibration_steps=2, lr=LR)
    if bases is not None:
        save_bases(bases, trainer.optimizer.bases)
    trainer.train()
    return model


def _make_trainer(model: Any, folder: Path, steps: int) -> Any:
    settings: dict[str, Any] = {"save_steps": 2, "lr_scheduler_type": "constant", "disable_tqdm": True}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        **settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=ROWS)  # type: ignore[arg-type]
