"""A store of bases: a run reuses the bases of an equal calibration."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsegrad.basis import Basis, load_bases, save_bases
from sparsegrad.distributed import copy_main_, on_main, whole
from sparsegrad.errors import UserError
from sparsegrad.files import load_json, unreadable, write_json
from sparsegrad.hashing import SHORT, tensors_sha256
from sparsegrad.trainer.peak_memory import PeakMemory


@dataclass(frozen=True, kw_only=True)
class BasisStore:
    """Bases in `folder`, each in a file named by the fingerprint of everything that it was computed from.

    Attributes:
        folder: created when the first bases are written.
        model: its weights, as they are when bases are asked for, are part of the fingerprint.
        facts: everything else that the calibration gradients depend on: linears, architecture, data, settings.
        own: the file with the bases of this run, so that it can continue without the store.
        resuming: whether the run continues from a checkpoint, and so must use the bases in `own`.
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
        fingerprint = None if settings is None else self.fingerprint(settings)
        found = self._find(fingerprint)
        if found is None:
            made, cost = self.measure(compute)
            # The same bases bit for bit on every process, each on its own device.
            matrices = (matrix for basis in made.values() for matrix in (basis.in_basis, basis.out_basis))
            copy_main_(matrix for matrix in matrices if matrix is not None)
            facts = {} if fingerprint is None else {"fingerprint": fingerprint, "reused": False}
            found = made, self._keep(made, {**facts, **cost}, fingerprint)
        # One memory layout, whether computed or read: otherwise products round differently, and a resumed run differs.
        return {kind: basis.by_columns() for kind, basis in found[0].items()}, found[1]

    @property
    def _own_cost(self) -> Path:
        return self.own.with_suffix(".json")

    @on_main
    def _find(self, fingerprint: str | None) -> tuple[dict[str, Basis], dict[str, Any]] | None:
        """The bases of this run, or of an equal calibration; on the CPU, as they are read."""
        if self.resuming and self.own.exists():
            return load_bases(self.own), self._read_cost()
        if fingerprint is None or not self._stored(fingerprint).exists():
            return None
        bases, cost = load_bases(self._stored(fingerprint), fingerprint), {"fingerprint": fingerprint, "reused": True}
        self._write(bases, cost, None)
        return bases, cost

    def _read_cost(self) -> dict[str, Any]:
        try:
            cost = load_json(self._own_cost)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{self._own_cost} is damaged ({error}): resume=false starts the run over") from None
        except OSError as error:
            raise unreadable(self._own_cost, error) from error
        if not isinstance(cost, dict):
            raise UserError(f"{self._own_cost} is damaged: resume=false starts the run over")
        return cost

    @on_main
    def _keep(self, bases: dict[str, Basis], cost: dict[str, Any], fingerprint: str | None) -> dict[str, Any]:
        """Write the bases for this run, and under `fingerprint` for later ones; return what they cost."""
        self._write(bases, cost, fingerprint)
        return cost

    def _write(self, bases: dict[str, Basis], cost: dict[str, Any], fingerprint: str | None) -> None:
        if fingerprint is not None:
            save_bases(self._stored(fingerprint), bases, fingerprint)
        save_bases(self.own, bases)
        write_json(self._own_cost, cost)

    def _stored(self, fingerprint: str) -> Path:
        return self.folder / f"{fingerprint}.safetensors"

    def fingerprint(self, settings: Mapping[str, Any]) -> str:
        """16 hex digits of the model's weights, the data and the settings."""
        head = json.dumps({**self.facts, **settings}, sort_keys=True, default=str)
        named = self.model.named_parameters()
        # One after the other, so that of a sharded model no more than one tensor is whole.
        return tensors_sha256(((f"{name}{tuple(one.shape)}", whole(one.detach())) for name, one in named), head)[:SHORT]

    def measure(self, compute: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """The result of `compute`, and the seconds and the memory that it took."""
        memory = PeakMemory(next(self.model.parameters()).device)
        memory.start()
        start = time.monotonic()
        result = compute()
        seconds = time.monotonic() - start
        memory.stop()
        return result, {"seconds": round(seconds, 2), "memory": memory.report()}
