"""Stored bases: a run reuses what an equal calibration left."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad.basis import Basis, load_bases, save_bases
from sparsegrad.memory import PeakMemory
from sparsegrad.records import write_json


@dataclass(frozen=True, kw_only=True)
class BasisStore:
    """Bases in `folder`, each named by the fingerprint of what it was made from.

    Attributes:
        folder: created when first written.
        model: its weights are part of the fingerprint, as they are when a basis is asked for.
        facts: what else the calibration gradients depend on: linears, architecture, data, settings.
        own: file where this run keeps the bases it uses, so that it can be continued when the store is gone.
        resuming: whether the run is continued, and therefore bound to the bases in `own`.
    """

    folder: Path
    model: nn.Module
    facts: Mapping[str, Any]
    own: Path
    resuming: bool

    def calibrated(
        self, settings: Mapping[str, Any] | None, compute: Callable[[], dict[str, Basis]]
    ) -> tuple[dict[str, Basis], dict[str, Any]]:
        """Bases and what they cost; see `Context.calibrated`."""
        if self.resuming and self.own.exists():
            return load_bases(self.own), json.loads(self._own_cost.read_text())
        bases, cost = self._found_or_made(settings, compute)
        save_bases(self.own, bases)
        write_json(self._own_cost, cost)
        return bases, cost

    @property
    def _own_cost(self) -> Path:
        return self.own.with_suffix(".json")

    def _found_or_made(
        self, settings: Mapping[str, Any] | None, compute: Callable[[], dict[str, Basis]]
    ) -> tuple[dict[str, Basis], dict[str, Any]]:
        if settings is None:
            return self._measured(compute)
        fingerprint = self.fingerprint(settings)
        path = self.folder / f"{fingerprint}.safetensors"
        if path.exists():
            return load_bases(path, fingerprint), {"fingerprint": fingerprint, "reused": True}
        bases, cost = self._measured(compute)
        save_bases(path, bases, fingerprint)
        return bases, {"fingerprint": fingerprint, "reused": False, **cost}

    def fingerprint(self, settings: Mapping[str, Any]) -> str:
        """16 hex digits of the model's weights, the data and the settings."""
        digest = hashlib.sha256(json.dumps({**self.facts, **settings}, sort_keys=True, default=str).encode())
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            # As bytes of any dtype: numpy knows no bfloat16.
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def _measured(self, compute: Callable[[], dict[str, Basis]]) -> tuple[dict[str, Basis], dict[str, Any]]:
        memory = PeakMemory(next(self.model.parameters()).device)
        memory.start()
        start = time.monotonic()
        bases = compute()
        seconds = time.monotonic() - start
        memory.stop()
        return bases, {"seconds": round(seconds, 2), "memory": memory.report()}
