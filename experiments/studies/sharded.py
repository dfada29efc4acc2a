"""Measure the bytes sent and the memory used per process, with whole weights (DDP) and with shards (FSDP2).

    python -m experiments.studies.sharded                       # 2 and 4 processes, 8 blocks of base width
    python -m experiments.studies.sharded --processes 2 --blocks 12

Each row is measured in its own processes over gloo on loopback. Only the MLP weights and the head train. `sent` is
the kernel's count of bytes that left a process's TCP sockets per step. `step_mib` and `calibration_mib` are the peaks
of resident memory during steps and calibration, above that of the process before it had a model. The vocabulary is
small, so that most parameters are in the blocks, as in a large model. The bases are random rotations, because neither
traffic nor memory of a step depends on them; the calibration sums real gradients. The results are written to
results/bench/sharded.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from experiments.paths import ROOT
from experiments.studies.bytes_per_step import context, random_basis, sent_bytes
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.calibration.grams import Grams
from sparsegrad.files import write_json
from sparsegrad.methods.base import adamw, freeze, trainable_parameters
from sparsegrad.methods.full import Full
from sparsegrad.methods.lora import Lora
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.methods.sparsegrad_fast import SparseGradFast
from sparsegrad.runs.environment import describe_environment
from sparsegrad.targets import find_mlp

METHODS: dict[str, Any] = {
    "full": Full(),
    "lora": Lora(rank=7),
    "sparsegrad": SparseGrad(),
    "sparsegrad sides=small moments=support": SparseGrad(sides="small", moments="support"),
    "sparsegrad_fast": SparseGradFast(),
}
ROWS = [(name, "ddp") for name in METHODS] + [(name, "fsdp2") for name in ("full", "lora", "sparsegrad_fast")]
WARM_UP, STEPS = 2, 2
VOCABULARY, BATCH, TOKENS = 2048, 2, 16
_MMAP_THRESHOLD = -3  # of glibc's mallopt


class Peak:
    """Peak of this process's resident memory in MiB, above that at the start."""

    def __init__(self) -> None:
        # Memory of freed tensors goes back to the system at once, so that it does not count.
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)
        gc.collect()
        self._before = _read_kib("VmRSS")

    @contextmanager
    def watch(self, found: dict[str, Any], name: str) -> Iterator[None]:
        """Note the peak inside the context as `found[name]`."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the peak back to what is resident now
        yield
        found[name] = round((_read_kib("VmHWM") - self._before) / 1024, 1)


def _read_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def base_model(blocks: int) -> Any:
    """BERT of base width with random weights, the same on every process."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=blocks, vocab_size=VOCABULARY))


def batches() -> Iterator[dict[str, torch.Tensor]]:
    """Endless random batches."""
    while True:
        yield {"input_ids": torch.randint(VOCABULARY, (BATCH, TOKENS)), "labels": torch.randint(2, (BATCH,))}


def shard(model: Any) -> None:
    """FSDP2 on each block and on the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def calibrate_only(model: nn.Module) -> None:
    """One batch of a calibration, without its decomposition."""
    mlp = {kind: list(found.values()) for kind, found in find_mlp(model).items()}
    with patch.object(Grams, "basis", lambda self: random_basis(self.shape)):
        calibrate(model, batches(), mlp, 1)


def prepare(name: str, parallel: str, blocks: int, peak: Peak, row: dict[str, Any]) -> tuple[Any, Any]:
    """The model as it trains, and its optimizer."""
    model, method = base_model(blocks), METHODS[name]
    settings = context(model, train_rest=False)
    if parallel == "fsdp2" and name == "lora":  # its layers are put in first
        method.prepare(model, find_mlp(model), settings)
        shard(model)
        return model, adamw(trainable_parameters(model), settings)
    freeze(model, find_mlp(model), settings, mlp_weights=True)
    if parallel == "fsdp2":
        shard(model)
    if name.startswith("sparsegrad"):
        with peak.watch(row, "calibration_mib"):
            calibrate_only(model)
    optimizer = method.prepare(model, find_mlp(model), settings).optimizer
    return (DistributedDataParallel(model, broadcast_buffers=False) if parallel == "ddp" else model), optimizer


def measure(rank: int, processes: int, name: str, parallel: str, blocks: int, folder: str) -> None:
    """One process of one row; the first writes it."""
    peak, row = Peak(), {"method": name, "parallel": parallel, "processes": processes}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    model, optimizer = prepare(name, parallel, blocks, peak, row)
    for _ in range(WARM_UP):
        step(model, optimizer)
    dist.barrier()
    before = sent_bytes()
    with peak.watch(row, "step_mib"):
        for _ in range(STEPS):
            step(model, optimizer)
    row["sent"] = (sent_bytes() - before) // STEPS
    if rank == 0:
        write_json(Path(folder) / "row.json", row)
    dist.barrier()
    dist.destroy_process_group()


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """One ordinary step."""
    model(**next(batches())).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_row(processes: int, name: str, parallel: str, blocks: int) -> dict[str, Any]:
    """The row of one method, forked from this process, which has imported everything once."""
    forking = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, name, parallel, blocks, folder)
        started = [forking.Process(target=measure, args=(rank, *arguments)) for rank in range(processes)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        found: dict[str, Any] = json.loads((Path(folder) / "row.json").read_text(encoding="utf-8"))
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: measure what the file lacks, and write it after each row."""
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.sharded", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/sharded.json")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a process with threads must not be forked
    for shape in ((3072, 768), (768, 3072)):
        random_basis(shape)  # once for all, and not counted
    model = f"BERT of width 768, MLP 3072, vocabulary {VOCABULARY}, {chosen.blocks} blocks, float32"
    rows = _read_rows(chosen.out, model)
    document = {
        "what": " ".join(__doc__.split("\n\n")[2].split()),
        "model": model,
        "backend": "gloo",
        "environment": describe_environment(torch.device("cpu")),
        "rows": rows,
    }
    done = {(row["method"], row["parallel"], row["processes"]) for row in rows}
    for processes in chosen.processes:
        for name, parallel in ROWS:
            if (name, parallel, processes) not in done:
                rows.append(measure_row(processes, name, parallel, chosen.blocks))
                print(json.dumps(rows[-1]), flush=True)
                write_json(chosen.out, document)
    return 0


def _read_rows(path: Path, model: str) -> list[dict[str, Any]]:
    """The rows that a stopped study of the same model has left."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows: list[dict[str, Any]] = found["rows"] if found.get("model") == model else []
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
