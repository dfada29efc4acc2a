"""The loss of a language model per token: a sum over all predicted tokens of a split, not a mean over batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsegrad.errors import DIVERGED, FailedRunError
from sparsegrad.tasks.language import IGNORED

if TYPE_CHECKING:
    from transformers import EvalPrediction

LANGUAGE_SCORES = ("nll", "perplexity", "tokens")


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Sum the losses of each row.

    Args:
        logits: (rows, length, vocabulary), or a tuple that begins with them.
        labels: (rows, length); `IGNORED` where there is no loss.

    Returns:
        (rows, 2) in float64: sum of the losses, number of tokens with a loss.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    sums = []
    # Position i predicts token i + 1. Row by row, because float32 logits of a whole batch take much memory.
    for row, label in zip(logits[:, :-1], labels[:, 1:], strict=True):
        loss = torch.nn.functional.cross_entropy(row.float(), label, ignore_index=IGNORED, reduction="sum")
        sums.append(torch.stack([loss.double(), (label != IGNORED).sum().double()]))
    return torch.stack(sums)


def language_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute nll (mean negative log-likelihood per token) and perplexity from the `token_losses` of a split.

    Raises:
        FailedRunError: if the sum is not finite.
    """
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    nll = float(sums[0] / sums[1])
    if not math.isfinite(nll):
        raise FailedRunError(f"the validation loss is not a finite number: training has {DIVERGED}; lower train.lr")
    # exp overflows float64 above 709.
    return dict(zip(LANGUAGE_SCORES, (nll, math.exp(min(nll, 700.0)), float(sums[1])), strict=True))
