"""Adapters never leave a model between base and trained: what was changed or failed halfway is noticed or undone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import Prepared, changed, own_model
from model_states import bits, has_bits
from torch import Tensor, nn

from sparsegrad import UserError, load_adapter, save_adapter, save_lora, set_adapter
from sparsegrad.adapter.merge import Patch, mark


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = own_model()
    model = changed(base)
    saved = save_adapter(model, tmp_path, base, Prepared(model[0].weight))  # type: ignore[arg-type]
    assert saved.forms["sparse"] > 0
    assert saved.forms["whole"] > 0
    return tmp_path


def fused_step(model: nn.Module, **settings: Any) -> None:
    """One step of the Trainer's default, which leaves torch's count of in-place writes as it was."""
    before = [parameter._version for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    assert before == [parameter._version for parameter in model.parameters()], "else this test tests nothing"


@pytest.mark.parametrize("alone", ["0.weight", "0.bias"])  # a sparse entry, a whole one
def test_a_fused_step_is_noticed_and_never_mixed_with_the_base(folder: Path, alone: str) -> None:
    model = own_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == alone)
    adapter = load_adapter(model, folder)
    adapter.merge()
    fused_step(model, lr=1e-3)
    trained = bits(model)
    with pytest.raises(UserError, match=rf"{alone} was changed .* save what you trained"):
        adapter.unmerge()
    assert adapter.merged
    assert has_bits(model, trained)


def test_a_fused_step_between_load_and_merge_is_noticed(folder: Path) -> None:
    model = own_model()
    adapter = load_adapter(model, folder)
    fused_step(model, lr=1e-3)
    with pytest.raises(UserError, match=r"0\.weight was changed .* load the base and the adapter again"):
        adapter.merge()
    assert not adapter.merged


def test_steps_that_cancel_out_in_a_sum_have_another_mark() -> None:
    """Adam's first step is +lr or -lr of each entry; a plain sum of bits is the same after it."""
    before = torch.full((3, 70_000), 1.5)
    for left, right in (((0, 0), (0, 1)), ((0, 0), (2, 7)), ((0, 0), (0, 2**16)), ((1, 5), (2, 69_999))):
        after = before.clone()
        after[left] += 2**-10
        after[right] -= 2**-10
        assert int(after.view(torch.int32).sum()) == int(before.view(torch.int32).sum())
        assert mark(after) != mark(before)
    signs = torch.ones(9)
    signs[2:4] = -1  # two highest bits, which add up to nothing where numbers have 32
    assert mark(signs) != mark(torch.ones(9))
    assert mark(torch.zeros(6)) != mark(torch.zeros(2, 3)) != mark(torch.zeros(2, 3, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool])
def test_the_mark_of_a_tensor_of_any_dtype_is_that_of_its_bits(dtype: torch.dtype) -> None:
    tensor = (torch.arange(200_001) % 2).to(dtype)
    assert mark(tensor) == mark(tensor.clone())
    for place in (0, 65_536, 200_000):
        other = tensor.clone()
        other[place] = 1 - int(other[place])
        assert mark(other) != mark(tensor)
    assert mark(tensor[:0])[2] == 0


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_merge_or_unmerge_that_fails_halfway_changes_nothing(
    folder: Path, failing: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, swap = own_model(), Patch.swap
    adapter = load_adapter(model, folder)
    calls: list[Patch] = []

    def fails(patch: Patch, *target: Tensor) -> None:
        calls.append(patch)
        if len(calls) == failing + 1:
            raise error
        swap(patch, *target)

    for merged in (False, True):
        calls.clear()
        before = bits(model)
        with monkeypatch.context() as patched:
            patched.setattr(Patch, "swap", fails)
            with pytest.raises(error):
                (adapter.unmerge if merged else adapter.merge)()
        assert adapter.merged == merged
        assert has_bits(model, before)
        (adapter.unmerge if merged else adapter.merge)()
        assert has_bits(model, bits(own_model() if merged else changed(own_model())))


@pytest.mark.parametrize("index", [None, torch.tensor([1, 3])])
def test_an_interruption_right_after_the_write_is_undone(index: Tensor | None) -> None:
    class Interrupted(Patch):
        """The signal comes between the write and the assignment of the old values."""

        def __setattr__(self, name: str, value: object) -> None:
            if name == "values" and "values" in self.__dict__:
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    target, values = torch.arange(4.0), torch.full((4 if index is None else 2,), 9.0)
    patch = Interrupted(values.clone(), index, mark(target))
    with pytest.raises(KeyboardInterrupt):
        patch.swap(target)
    assert torch.equal(target, torch.arange(4.0))
    assert torch.equal(patch.values, values)


def test_tensors_that_were_replaced_are_found_by_name(folder: Path) -> None:
    """As `model.to(device)` and `load_state_dict(assign=True)` do."""
    model = own_model()
    adapter = load_adapter(model, folder)
    for merge, wanted in ((adapter.merge, changed(own_model())), (adapter.unmerge, own_model())):
        model.load_state_dict(bits(model), assign=True)
        merge()
        assert has_bits(model, bits(wanted))


def test_a_buffer_that_apply_replaced_is_merged(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = copy.deepcopy(base)
    model(torch.randn(8, 4))
    with torch.no_grad():
        model[0].weight[0] += 1
    save_adapter(model, tmp_path, base, Prepared(model[0].weight))  # type: ignore[arg-type]
    adapter = load_adapter(base, tmp_path)
    base._apply(torch.clone)
    adapter.merge()
    assert has_bits(base, bits(model))


def test_another_dtype_or_a_lost_tensor_is_refused_at_merge(folder: Path) -> None:
    model: Any = own_model()
    adapter = load_adapter(model, folder)
    model.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"0\.weight was converted from torch\.float32 to torch\.bfloat16"):
        adapter.merge()
    model = own_model()
    adapter = load_adapter(model, folder)
    del model[1]
    before = bits(model)
    with pytest.raises(UserError, match=r"1\.\w+ was changed"):
        adapter.merge()
    assert has_bits(model, before)


def test_memory_laid_out_otherwise_is_refused_at_merge(folder: Path) -> None:
    model: Any = own_model()
    adapter = load_adapter(model, folder)
    model[0].weight.data = model[0].weight.detach().t().contiguous().t()
    with pytest.raises(UserError, match=r"0\.weight is not contiguous") as refusal:
        adapter.merge()
    assert has_bits(model, bits(own_model()))
    exec(str(refusal.value).partition(", run ")[2])  # the remedy
    adapter.merge()


def test_a_switch_that_cannot_go_on_leaves_the_base(folder: Path) -> None:
    model = own_model()
    one, two = load_adapter(model, folder), load_adapter(model, folder)
    two._patches["1.bias"].now = mark(torch.zeros(3))
    one.merge()
    with pytest.raises(UserError, match=r"1\.bias was changed"):
        set_adapter(model, two)
    assert not one.merged
    assert has_bits(model, bits(own_model()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_values_stay_on_their_own_device(folder: Path) -> None:
    model = own_model().cuda()
    adapter = load_adapter(model, folder)
    adapter.merge()
    assert {patch.values.device.type for patch in adapter._patches.values()} == {"cpu"}
    model.cpu()
    adapter.unmerge()
    assert has_bits(model, bits(own_model()))


def test_a_base_that_was_trained_along_is_refused(tmp_path: Path) -> None:
    """`state_dict()` shares the memory of the model: what it was before training is lost."""
    base = own_model()
    state = base.state_dict()
    with torch.no_grad():
        base[1].bias.add_(1)
    for shared in (state, base, {**copy.deepcopy(state), "1.bias": state["1.bias"]}):
        with pytest.raises(UserError, match=r"shares the memory of [01]\.\w+ with the model, .* copy from before"):
            save_adapter(base, tmp_path, shared, target_modules=["0"])
        with pytest.raises(UserError, match=r"shares the memory of [01]\.\w+ with the model"):
            save_lora(base, tmp_path, shared, rank=2)
    assert not list(tmp_path.iterdir())


def test_a_base_may_share_what_does_not_train(tmp_path: Path) -> None:
    model = own_model()
    state = copy.deepcopy(model.state_dict())
    state["1.weight"], state["1.bias"] = model[1].weight, model[1].bias.requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    saved: Any = save_adapter(model, tmp_path, state, Prepared(model[0].weight))  # type: ignore[arg-type]
    assert sum(saved.forms.values()) == 1, "the weight alone"
    with pytest.raises(UserError, match=r"shares the memory of 1\.weight"):
        save_lora(model, tmp_path / "lora", state, rank=2)  # which cannot know what trained, except by requires_grad
    model[1].weight.requires_grad_(False)
    save_lora(model, tmp_path / "lora", state, rank=2)


def test_a_base_does_not_share_what_forward_passes_change(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = {**model.state_dict(), **{name: value.detach().clone() for name, value in model.named_parameters()}}
    model(torch.randn(5, 4))
    with pytest.raises(UserError, match=r"shares the memory of 1\.running_mean"):
        save_adapter(model, tmp_path, state, Prepared(model[0].weight))  # type: ignore[arg-type]


def test_a_folder_holds_one_adapter(tmp_path: Path) -> None:
    """The card of the one would describe the other."""
    base = own_model()
    model = changed(base)
    optimizer: Any = Prepared(model[0].weight)
    save_adapter(model, tmp_path / "whole", base, optimizer)
    save_lora(model, tmp_path / "lora", base, rank=2)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match=r"has an adapter of save_adapter .*: give another folder, or delete this one"):
        save_lora(model, tmp_path / "whole", base, rank=2)
    with pytest.raises(
        UserError, match=r"has a LoRA adapter \(adapter_config\.json\): give another folder, or delete this one"
    ):
        save_adapter(model, tmp_path / "lora", base, optimizer)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
