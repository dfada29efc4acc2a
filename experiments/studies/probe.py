"""A model in training whose MLP gradients can be inspected, for figures 2 and 3 and the basis study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, set_seed

from experiments.paths import CONF
from sparsegrad.basis import Basis
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.models.loading import load_model, load_tokenizer
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.overrides import explain
from sparsegrad.targets import find_mlp
from sparsegrad.tasks.base import tokenize
from sparsegrad.trainer.quiet import quiet_transformers

Batch = Mapping[str, Any]
CALIBRATION_STEPS = 30


def build_run(*overrides: str) -> RunConfig:
    """The checked configuration that run.py composes from `overrides`.

    Raises:
        UserError: for an invalid override, or a value that is not allowed.
    """
    try:
        return build(compose_run(overrides, CONF))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides, CONF) from None


class Probe:
    """One model on one task, calibrated as in the paper's text and trained with SparseGrad.

    Attributes:
        bases: layer kind -> HOSVD basis of the calibration gradients.
        linears: layer kind -> its linears, block by block.
    """

    def __init__(self, config: RunConfig) -> None:
        quiet_transformers()
        set_seed(config.seed)
        self.config = config
        self.tokenizer = load_tokenizer(config.model)
        self.model = load_model(config.model, config.task, self.tokenizer)
        self.linears = {kind: list(of.values()) for kind, of in find_mlp(self.model, config.model.mlp).items()}
        self.rows = tokenize(config.task.load(config.data).train, config.task, self.tokenizer, config.data)
        self.model.train()
        self.bases = calibrate(self.model, self.batches(1), self.linears, CALIBRATION_STEPS)
        self.optimizer = SparseGradAdamW(self._groups(), lr=config.train.lr)

    def batches(self, stream: int, pad: str = "longest") -> Iterator[Batch]:
        """Endless batches of shuffled rows; equal `stream` gives equal rows. `pad` is as in `data.pad`."""
        generator = torch.Generator().manual_seed(1000 * self.config.seed + stream)
        width = self.config.data.max_length if pad == "max_length" else None
        collate = DataCollatorWithPadding(self.tokenizer, padding=pad, max_length=width)
        size = self.config.train.batch_size
        loader = DataLoader(
            self.rows, batch_size=size, shuffle=True, drop_last=True, generator=generator, collate_fn=collate
        )
        while True:
            yield from loader

    def backward(self, batch: Batch) -> float:
        """Replace all gradients by those of one batch; returns its loss."""
        self.model.zero_grad()
        loss: Tensor = self.model(**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def gradients(self, kind: str) -> list[Tensor]:
        """Weight gradients (out, in) of one layer kind after `backward`, in order of blocks."""
        return [linear.weight.grad for linear in self.linears[kind] if linear.weight.grad is not None]

    def output_gradients(self, batch: Batch) -> dict[str, list[Tensor]]:
        """dL/dY (batch * tokens, out) of every linear by kind, in order of blocks; runs `backward`."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in self.linears}
        hooks = [
            linear.register_full_backward_hook(_keep(found[kind]))
            for kind, linears in self.linears.items()
            for linear in linears
        ]
        try:
            self.backward(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return {kind: grads[::-1] for kind, grads in found.items()}  # back-propagation reaches the last block first

    def _groups(self) -> list[dict[str, Any]]:
        weights = {kind: [linear.weight for linear in of] for kind, of in self.linears.items()}
        # By identity, because == of tensors compares elements.
        sparse = {id(weight) for of in weights.values() for weight in of}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in sparse]
        groups = [{"params": of, "basis": self.bases[kind], "density": 0.01} for kind, of in weights.items()]
        return [*groups, {"params": rest}]


def _keep(found: list[Tensor]) -> Any:
    def hook(module: nn.Module, grad_input: Any, grad_output: Sequence[Tensor]) -> None:
        found.append(grad_output[0].detach().flatten(0, -2))

    return hook


def variants(basis: Basis, seed: int = 0) -> dict[str, Basis]:
    """The bases that the basis study compares, by name, for one layer kind.

    Raises:
        UserError: for a one-sided basis.
    """
    U, V = basis.both()  # (in, in), (out, out)
    none = Basis.identity(len(V), len(U))
    generator = torch.Generator().manual_seed(seed)
    random = [torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (len(U), len(V))]
    return {
        "none": none,
        "in-side": basis.only("in"),
        "out-side": basis.only("out"),
        "both": basis,
        "authors": Basis(U.T.contiguous(), V),  # V^T G U^T instead of V^T G U
        "random": Basis(*random),
    }


def top_energy(matrix: Tensor, density: float) -> float:
    """Share of the squared norm of a matrix in its largest entries, of which `density` is the share of all entries."""
    squares = matrix.square().flatten().double()
    total = squares.sum().item()
    return 0.0 if total == 0 else squares.topk(max(1, round(density * squares.numel()))).values.sum().item() / total
