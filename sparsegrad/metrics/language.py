"""The loss of a language model per token: summed over all predicted tokens of a split, not averaged over batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsegrad.errors import UserError
from sparsegrad.tasks.language import IGNORED

if TYPE_CHECKING:
    from transformers import EvalPrediction


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Logits (rows, length, vocabulary), labels (rows, length) -> sum of losses and number of tokens, (rows, 2)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    sums = []
    for row, label in zip(logits[:, :-1], labels[:, 1:], strict=True):  # row by row: float32 logits are large
        loss = torch.nn.functional.cross_entropy(row.float(), label, ignore_index=IGNORED, reduction="sum")
        sums.append(torch.stack([loss.double(), (label != IGNORED).sum().double()]))
    return torch.stack(sums)


def language_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What `token_losses` gave, over a split -> nll (mean negative log-likelihood per token) and perplexity.

    Raises:
        UserError: when the sum is not finite.
    """
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    nll = float(sums[0] / sums[1])
    if not math.isfinite(nll):
        raise UserError("the validation loss is not a finite number: training has diverged; lower the learning rate")
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "tokens": float(sums[1])}
