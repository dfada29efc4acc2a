"""Measure how many bytes processes send to each other in one training step, instead of computing them from shapes.

    python -m experiments.studies.bytes_per_step                        # 2 and 4 processes, two blocks of base width
    python -m experiments.studies.bytes_per_step --processes 2 --blocks 12

Each process trains the same model under `DistributedDataParallel` over gloo on loopback. Bytes are counted per step and
process: `payload` is the total size of the buckets that DDP passes to its all-reduce, counted by a communication hook;
`sent` is the kernel's count of bytes sent over the process's TCP sockets (`tcpi_bytes_sent`), which includes protocol
and control messages. The results are written to results/bench/bytes_per_step.json. The bases are random rotations,
because the traffic does not depend on them. Calibration is counted separately.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from experiments.paths import ROOT
from sparsegrad.basis import Basis
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.files import write_json
from sparsegrad.methods.base import Context, Method
from sparsegrad.methods.full import Full
from sparsegrad.methods.lora import Lora
from sparsegrad.methods.meprop import MeProp
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.methods.sparsegrad_fast import SparseGradFast
from sparsegrad.runs.environment import describe_environment
from sparsegrad.targets import find_mlp

METHODS: dict[str, Any] = {
    "full": Full(),
    "lora": Lora(rank=7),
    "meprop": MeProp(),
    "sparsegrad": SparseGrad(),
    "sparsegrad_fast": SparseGradFast(),
}
ROWS, TOKENS = 2, 16
WARM_UP, STEPS = 2, 2
_BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info


@dataclass
class Payload:
    """Counts the bytes that DDP passes to its all-reduce."""

    bytes: int = 0

    def watch(self, wrapped: DistributedDataParallel) -> None:
        """Register as the communication hook; as a lambda, because DDP rejects annotations that are strings."""
        wrapped.register_comm_hook(None, lambda _, bucket: self._count(bucket))

    def _count(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Count the bucket, then average it as DDP does without a hook."""
        whole = bucket.buffer()
        self.bytes += whole.numel() * whole.element_size()
        work: Any = dist.all_reduce(whole.div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])  # type: ignore[no-any-return]


def sent_bytes() -> int:
    """Bytes that this process has sent over its TCP sockets so far, from Linux's counters."""
    return sum(_read_sent(int(name)) for name in os.listdir("/proc/self/fd"))


def count_sent(action: Callable[[], object]) -> int:
    """Bytes that this process sends during `action`, which every process must call together."""
    dist.barrier()
    before = sent_bytes()
    action()
    sent = sent_bytes() - before
    # A process that ends closes its connections; its peers then close theirs, and the counts of those sockets are
    # lost. So no process may go on before all have counted.
    dist.barrier()
    assert sent >= 0, f"{-sent} bytes were sent over sockets that have been closed since"
    return sent


def _read_sent(descriptor: int) -> int:
    try:
        own = os.dup(descriptor)  # closing the socket object must not close the original
        try:
            opened = socket.socket(fileno=own)
        except OSError:
            os.close(own)  # not a socket, so no socket object owns it
            return 0
        with opened as found:
            if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
                return 0
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT + 8)
            return int(struct.unpack_from("=Q", info, _BYTES_SENT)[0])
    except OSError:  # the descriptor was closed meanwhile
        return 0


def base_model(blocks: int) -> nn.Module:
    """BERT of base width with `blocks` blocks and random weights, the same on every process."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=blocks))  # type: ignore[no-any-return]


def batches() -> Iterator[dict[str, Tensor]]:
    """Endless random batches."""
    while True:
        yield {"input_ids": torch.randint(30000, (ROWS, TOKENS)), "labels": torch.randint(2, (ROWS,))}


@cache
def random_basis(shape: tuple[int, ...]) -> Basis:
    """A basis of two random rotations for a weight of `shape` (out, in)."""
    out_basis, in_basis = (torch.linalg.qr(torch.randn(size, size)).Q for size in shape)
    return Basis(in_basis, out_basis)


def context(model: nn.Module, train_rest: bool) -> Context:
    """The context that methods need, with random bases in place of calibrated ones."""
    shapes = {kind: tuple(next(iter(found.values())).weight.shape) for kind, found in find_mlp(model).items()}
    return Context(
        lr=1e-4,
        weight_decay=0.0,
        train_rest=train_rest,
        is_head=lambda name: name.startswith("classifier"),
        batches=batches,
        calibrated=lambda _, __: ({kind: random_basis(shape) for kind, shape in shapes.items()}, {}),
    )


def count_steps(method: Method, train_rest: bool, blocks: int) -> dict[str, int]:
    """Train a few steps under DDP: payload and sent bytes per step, and the number of trainable entries."""
    model = base_model(blocks)
    prepared = method.prepare(model, find_mlp(model), context(model, train_rest))
    wrapped, payload = DistributedDataParallel(model, broadcast_buffers=False), Payload()
    payload.watch(wrapped)
    counted = per_step(partial(_step, wrapped, prepared.optimizer), payload)
    return {**counted, "trainable": prepared.trainable}


def _step(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    wrapped(**next(batches())).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def per_step(step: Callable[[], None], payload: Payload) -> dict[str, int]:
    """Both counters per step, averaged over `STEPS`; during the warm-up DDP rebuilds its buckets."""
    for _ in range(WARM_UP):
        step()
    payload.bytes = 0

    def steps() -> None:
        for _ in range(STEPS):
            step()

    sent = count_sent(steps)
    return {"payload": payload.bytes // STEPS, "sent": sent // STEPS}


def count_calibration(blocks: int) -> dict[str, int]:
    """Sent bytes per calibration batch."""
    model = base_model(blocks)
    mlp = {kind: list(found.values()) for kind, found in find_mlp(model).items()}
    sent = count_sent(lambda: calibrate(model, batches(), mlp, STEPS, sides="in"))
    return {"sent": sent // STEPS}


def worker(rank: int, processes: int, blocks: int, folder: str) -> None:
    """One process: count everything; rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    rows = []
    for train_rest in (True, False):
        for name, method in METHODS.items():
            rows.append({"method": name, "train_rest": train_rest, "processes": processes})
            rows[-1] |= count_steps(method, train_rest, blocks)
    calibration = {"processes": processes, **count_calibration(blocks)}
    if rank == 0:
        write_json(Path(folder) / "rows.json", {"steps": rows, "calibration": calibration})
    dist.destroy_process_group()


def measure(processes: int, blocks: int) -> dict[str, Any]:
    """The rows for one number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
            worker, (processes, blocks, folder), processes
        )
        found: dict[str, Any] = json.loads((Path(folder) / "rows.json").read_text())
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: count, write the file, print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.bytes_per_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/bytes_per_step.json")
    chosen = parser.parse_args(arguments)
    found = [measure(processes, chosen.blocks) for processes in chosen.processes]
    rows = [row for one in found for row in one["steps"]]
    write_json(
        chosen.out,
        {
            "what": " ".join(__doc__.split("\n\n")[2].split()),
            "model": f"BERT of width 768, MLP 3072, vocabulary 30522, {chosen.blocks} blocks, float32",
            "backend": "gloo",
            "environment": describe_environment(torch.device("cpu")),
            "rows": rows,
            "calibration_per_batch": [one["calibration"] for one in found],
        },
    )
    for row in rows:
        print("{method:16} train_rest={train_rest!s:5} x{processes} {payload:>12,} {sent:>12,}".format(**row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
