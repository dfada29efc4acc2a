"""Models on several devices (`device_map`): a basis per device, without a second device at hand."""

from __future__ import annotations

import pytest
import torch
from engine_checks import basis_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsegrad import Basis, SparseGradAdamW
from sparsegrad.optim.rotation import Rotation


@pytest.mark.parametrize("sides", ["both", "small"])
@pytest.mark.parametrize("moments", ["dense", "support"])
def test_a_step_mixes_no_devices(moments: str, sides: str) -> None:
    """Fake tensors have shapes and devices alone, and refuse any operation on two devices."""
    with FakeTensorMode():
        weights = [nn.Parameter(torch.randn(8, 6, device=device)) for device in ("cpu", "meta", "cpu")]
        basis = Basis(torch.randn(6, 6), torch.randn(8, 8)).only(sides)
        rotation = Rotation(basis, "gradient")
        group = {"params": weights, "keep": 5, "moments": moments, "basis": basis, "rotation": rotation}
        optimizer = SparseGradAdamW([group], weight_decay=0.1)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        moments_on = {state["exp_avg"].device for state in optimizer.state.values()}
        assert moments_on == {torch.device("cpu"), torch.device("meta")}
        assert len(rotation._copies) == 1, "a second basis, for the second device"


def test_the_first_weights_take_the_basis_along_and_others_get_a_copy() -> None:
    rotation = Rotation(basis_of(8, 6))
    cpu, meta = torch.device("cpu"), torch.device("meta")
    first = rotation.place(cpu, torch.float32)
    second = rotation.place(meta, torch.float32)
    for _ in range(2):
        assert rotation.place(cpu, torch.float32) is first is rotation.basis
        assert rotation.place(meta, torch.float32) is second
    rotation.load(basis_of(8, 6))
    assert rotation.place(meta, torch.float32) is rotation.basis is not second
