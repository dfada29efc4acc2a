"""On a CUDA device: the same steps as on a CPU, no wait of the host for it, memory, NCCL. Skipped without one."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import METHODS, batches, bert, context
from run_fixtures import ROOT, SHORT, TINY, environment, free_port, last_wins, write_rows

from sparsegrad import Basis, SparseGradAdamW, find_mlp, prepare
from sparsegrad.methods.base import Method
from sparsegrad.methods.full import Full
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.optim.rotation import Rotation
from sparsegrad.optim.rounding import _noise, add_stochastic
from sparsegrad.optim.selection import top_k_index

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ENGINES: dict[str, Method] = {**METHODS, "layer": SparseGrad(density=0.05, steps=4, engine="layer")}
# Their start differs between devices: it is the SVD of the signs of gradients, some of which are near 0, or a
# randomised SVD in float32.
LOOSE = ("lora_ga", "lora_sb")
MIB = 2**20


def walk(method: Method, device: str, bases: list[dict[str, Basis]], steps: int = 5) -> dict[str, torch.Tensor]:
    """The weights, on the CPU, after some steps in float64, with the bases of the first walk that got this list.

    Bases are not unique where eigenvalues are equal, so those of two devices differ.
    """
    model: Any = bert().to(device)
    about = context(model, [])

    def calibrated(_: Any, compute: Any) -> Any:
        found = compute()  # in any case: that of the authors trains
        if not bases:
            bases.append(found)
        return {kind: basis.to(device) for kind, basis in bases[0].items()}, {}

    prepared = method.prepare(model, find_mlp(model), dataclasses.replace(about, calibrated=calibrated))
    for _, batch in zip(range(steps), batches(), strict=False):
        model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
    prepared.finish()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_takes_the_steps_of_the_cpu(name: str) -> None:
    bases: list[dict[str, Basis]] = []
    on_cpu, on_gpu = walk(ENGINES[name], "cpu", bases), walk(ENGINES[name], "cuda", bases)
    tolerance = 1e-5 if name in LOOSE else 1e-8
    for key, weight in on_cpu.items():
        assert torch.allclose(on_gpu[key], weight, atol=tolerance, rtol=0), key


def weights_and_gradients(count: int, device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.nn.Parameter(torch.randn(96, 64, generator=generator).to(device)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.randn(96, 64, generator=generator).to(device)
    return weights


def orthogonal(device: str) -> Basis:
    generator = torch.Generator().manual_seed(4)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q.to(device) for size in (64, 96))
    return Basis(U, V)


@pytest.mark.parametrize("moments", ["dense", "support"])
def test_weights_that_are_stepped_together_move_as_each_alone(moments: str) -> None:
    """One batched kernel for all weights of a kind on the GPU, one weight at a time on the CPU."""
    alone, batched = weights_and_gradients(5, "cpu"), weights_and_gradients(5, "cuda")
    groups = [{"params": [weight], "basis": orthogonal("cpu"), "density": 0.02, "moments": moments} for weight in alone]
    one = SparseGradAdamW(groups, lr=1e-2)
    all_at_once = SparseGradAdamW(
        [{"params": batched, "basis": orthogonal("cuda"), "density": 0.02, "moments": moments}], lr=1e-2
    )
    for _ in range(3):
        one.step()
        all_at_once.step()
    for single, together in zip(alone, batched, strict=True):
        assert torch.allclose(together.cpu(), single, atol=1e-5)


def _move(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    moved = torch.nn.Parameter(weight.detach().cuda())
    assert weight.grad is not None
    moved.grad = weight.grad.cuda()
    return moved


@pytest.mark.parametrize("moments", ["dense", "support"])
def test_weights_of_one_kind_on_two_devices_take_the_steps_of_one(moments: str) -> None:
    """As with `device_map`: each device has the basis."""
    alone, spread = weights_and_gradients(4, "cpu"), weights_and_gradients(4, "cpu")
    spread = [weight if number % 2 else _move(weight) for number, weight in enumerate(spread)]
    for weights in (alone, spread):
        basis = orthogonal("cpu")
        group = {"params": weights, "basis": basis, "density": 0.02, "moments": moments}
        optimizer = SparseGradAdamW([{**group, "rotation": Rotation(basis, "gradient")}], lr=1e-2)
        for _ in range(3):
            optimizer.step()
    for one, other in zip(alone, spread, strict=True):
        assert torch.allclose(other.cpu(), one, atol=1e-5)


def test_the_kept_entries_are_those_of_the_cpu() -> None:
    gradient = torch.randn(3, 300, 400, generator=torch.Generator().manual_seed(5))
    on_cpu, on_gpu = top_k_index(gradient, 1200), top_k_index(gradient.cuda(), 1200)
    assert torch.equal(on_gpu.cpu().sort(-1).values, on_cpu.sort(-1).values)


def test_rounding_is_that_of_the_cpu_bit_for_bit_and_small_changes_add_up() -> None:
    """Replicas on different devices would part otherwise."""
    source = torch.randn(7)
    like = torch.zeros(1, 1000)
    assert torch.equal(_noise(like, source[None]), _noise(like.cuda(), source[None].cuda()).cpu())
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    change = torch.full((4096,), 1e-3, device="cuda")
    for _ in range(1000):
        add_stochastic(weight, change, torch.randn(3, device="cuda"))
    assert abs(float(weight.float().mean()) - 2) < 0.005


def test_a_model_in_bfloat16_drifts_no_further_from_float32_than_its_rounding() -> None:
    """Ten steps from the same start: the weights differ by less than they have moved."""

    def trained(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model: Any = bert(torch.bfloat16).to(dtype).cuda()
        moved = ({name: value.cuda() for name, value in batch.items()} for batch in batches())
        optimizer = prepare(model, moved, density=0.05, calibration_steps=4, lr=1e-3)
        for _, batch in zip(range(10), moved, strict=False):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        names = optimizer.param_groups[0]["param_names"]
        return {name: model.get_parameter(name).detach().float() for name in names}

    begun = {name: weight.detach().float().cuda() for name, weight in bert(torch.bfloat16).named_parameters()}
    exact, rounded = trained(torch.float32), trained(torch.bfloat16)
    for name, weight in exact.items():
        moved = (weight - begun[name]).abs().mean()
        assert (rounded[name] - weight).abs().mean() < 0.6 * moved, name


@pytest.mark.parametrize("name", ["full", "meprop", "sparsegrad", "sparsegrad_fast"])
def test_a_step_never_waits_for_the_device(name: str) -> None:
    model: Any = bert(torch.float32).cuda()
    prepared = ENGINES[name].prepare(model, find_mlp(model), context(model, []))
    batch = {key: value.cuda() for key, value in next(batches()).items()}
    for step in range(4):
        model(**batch).loss.backward()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps make their state
        try:
            prepared.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        prepared.optimizer.zero_grad()


def peak(method: Method) -> float:
    """MiB that five steps of four base-sized blocks allocate at most."""
    from transformers import BertConfig, BertForSequenceClassification

    gc.collect()  # models of earlier calls, which hooks keep in circles
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=4, vocab_size=1000)
    model = BertForSequenceClassification(config).cuda()
    ids, labels = torch.randint(1000, (8, 128), device="cuda"), torch.arange(8, device="cuda") % 2
    again = dataclasses.replace(context(model, []), batches=lambda: iter([{"input_ids": ids, "labels": labels}] * 9))
    prepared = method.prepare(model, find_mlp(model), again)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        model(input_ids=ids, labels=labels).loss.backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() / MIB


def test_the_lean_merged_engine_takes_no_more_memory_than_full_fine_tuning() -> None:
    """Dense moments take what full fine-tuning does, and the bases; compact ones and released gradients take less."""
    lean = SparseGrad(density=0.01, steps=4, moments="support", release_gradients=True)
    full, dense, least = peak(Full()), peak(SparseGrad(density=0.01, steps=4)), peak(lean)
    bases = 2 * (768**2 + 3072**2) * 4 / MIB
    workspace = 8 * 3 * 768 * 3072 * 4 / MIB  # all weights of a kind, rotated, once more and their change
    assert least <= full
    assert dense <= full + bases + workspace


def test_nccl_with_one_process_changes_nothing(tmp_path: Path) -> None:
    """torchrun and DDP over NCCL against an ordinary process."""
    data = f"data.dir={write_rows(tmp_path)}"
    common = last_wins(*TINY, *SHORT, "train.device=cuda", "train.lr=1e-4", "method=sparsegrad", "method.steps=6", data)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=1", f"--master-port={free_port()}"]
    losses = []
    for name, launcher in (("alone", []), ("nccl", launch)):
        places = [f"results_dir={tmp_path / name}", f"work_dir={tmp_path / 'work'}"]  # one store of bases
        command = [sys.executable, *launcher, str(ROOT / "run.py"), *common, *places]
        subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=300)
        (path,) = (tmp_path / name).rglob("*.json")
        losses.append([row["loss"] for row in json.loads(path.read_text())["losses"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_prepare_and_ddp_over_nccl_with_one_process() -> None:
    from torch.nn.parallel import DistributedDataParallel

    def trained(wrap: bool) -> torch.Tensor:
        model: Any = bert().cuda()
        moved = ({name: value.cuda() for name, value in batch.items()} for batch in batches())
        optimizer = prepare(model, moved, density=0.05, calibration_steps=4, lr=1e-3)
        called = DistributedDataParallel(model, device_ids=[0]) if wrap else model
        for _, batch in zip(range(4), moved, strict=False):
            called(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    alone = trained(wrap=False)
    address = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    try:
        assert torch.allclose(trained(wrap=True), alone, atol=1e-10)
    finally:
        torch.distributed.destroy_process_group()
