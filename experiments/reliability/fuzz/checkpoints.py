"""The reader of checkpoints, damaged by accident or by an attacker who also writes a matching manifest."""

from __future__ import annotations

import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from experiments.reliability.fuzz import mutate
from experiments.reliability.fuzz.base import LINES, TENSOR_FILE, Reader
from sparsegrad.basis import Basis
from sparsegrad.errors import UserError
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.groups import param_groups
from sparsegrad.targets import find_mlp
from sparsegrad.trainer.callbacks import LossWatch
from sparsegrad.trainer.checkpoints import MANIFEST, is_whole, last_checkpoint, seal
from sparsegrad.trainer.trainer import RunTrainer

FACTS = {"unlogged": {"loss": 0.0, "since": 0}}
_STATE = "trainer_state.json"


def _trainer(folder: Path) -> RunTrainer:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    bases = {"intermediate": Basis(torch.eye(8), torch.eye(16)), "output": Basis(torch.eye(16), torch.eye(8))}
    optimizer = SparseGradAdamW(param_groups(model, find_mlp(model), bases, keep=5), lr=1e-3)
    rows: Any = [{"input_ids": torch.tensor([1, 2, i]), "labels": torch.tensor(i % 2)} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, restore_callback_states_from_checkpoint=True, max_grad_norm=0, save_total_limit=None,
    )  # fmt: skip
    return RunTrainer(model, args, train_dataset=rows, optimizers=(optimizer, None), loss_watch=LossWatch())


@cache
def _trained() -> tuple[RunTrainer, Path]:
    """A trainer and the folder of the two checkpoints that it wrote; once per process, as training takes seconds."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    trainer = _trainer(folder)
    trainer.train()
    return trainer, folder


def _make(folder: Path) -> None:
    _, made = _trained()
    shutil.copytree(made, folder, dirs_exist_ok=True)
    shutil.rmtree(made)
    for checkpoint in folder.iterdir():
        seal(checkpoint, FACTS)


def _repair(folder: Path, draw: random.Random) -> None:
    """In half of the inputs, write a new manifest that matches the damaged files: the check of hashes then passes."""
    newest = folder / "checkpoint-2"
    # Hashing an oversized file would take longer than the whole read.
    huge = any(path.stat().st_size >= mutate.HUGE for path in newest.iterdir())
    if draw.random() < 0.5 and not huge:
        seal(newest, FACTS)


def _read(folder: Path) -> None:
    found = last_checkpoint(folder)
    if found is None:
        raise UserError("no checkpoint is complete: the run starts over")
    assert is_whole(Path(found))
    trainer, _ = _trained()
    trainer._is_done(found)
    # Each load adds this callback; the shared trainer would collect thousands of them.
    trainer.callback_handler.callbacks = [
        one for one in trainer.callback_handler.callbacks if "RestoreLosses" not in str(one)
    ]
    trainer._load_from_checkpoint(found)
    trainer._load_optimizer_and_scheduler(found)
    trainer._load_rng_state(found)
    if found.endswith("1"):
        raise UserError("the newest checkpoint is damaged: the run resumes from the one before")


CHECKPOINTS = Reader(
    _make,
    {
        f"checkpoint-2/{MANIFEST}": LINES,
        f"checkpoint-2/{_STATE}": LINES,
        "checkpoint-2/model.safetensors": TENSOR_FILE,
        "checkpoint-2/optimizer.pt": mutate.ANY,
        "checkpoint-2/scheduler.pt": mutate.ANY,
        "checkpoint-2/rng_state.pth": mutate.ANY,
        "checkpoint-2/training_args.bin": mutate.ANY,
    },
    _read,
    _repair,
)
