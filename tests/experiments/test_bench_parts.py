"""Parts of the benchmark: predicted costs, fused LoRA, shapes, token lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench import reflections
from experiments.bench.arithmetic import COSTS, Linear, relative_speed
from experiments.bench.lengths import batch_lengths, histograms, mean_length, token_batch
from experiments.bench.render import predictions
from experiments.bench.rivals import FusedLoraLinear, _FusedLora
from experiments.bench.shapes import SHAPES, build_model, find_shape, mlp_linears
from sparsegrad import Basis, SparseGradLinear
from sparsegrad.basis import load_bases
from sparsegrad.errors import UserError
from sparsegrad.layers.block import BlockLinear

N, M, T, RANK, CORE = 24, 40, 64, 3, (8, 6)
LINEAR = Linear(n=N, m=M, T=T, c=CORE[0], r=CORE[1], s=RANK)


def _frozen(linear: nn.Linear) -> nn.Module:
    linear.weight.requires_grad_(False)
    return linear


LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "frozen": _frozen,
    "full": lambda linear: linear,
    "lora": lambda linear: FusedLoraLinear(_frozen(linear), RANK),  # type: ignore[arg-type]
    "layer": lambda linear: SparseGradLinear.from_linear(linear, Basis.identity(M, N), keep=9),
    "block": lambda linear: BlockLinear.from_linear(linear, Basis.identity(M, N), CORE),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_predicted_cost_is_what_a_pass_multiplies(name: str) -> None:
    layer = LAYERS[name](nn.Linear(N, M))
    x = torch.randn(T, N, requires_grad=True)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        layer(x).sum().backward()
    merged = min(CORE) / (2 * T) if name == "block" else 0  # the block's merge comes after a step
    assert counter.get_total_flops() == pytest.approx((COSTS[name](LINEAR) - merged) * LINEAR.product)


def test_the_rotation_costs_less_the_more_tokens_share_it() -> None:
    few, many = (Linear(n=N, m=M, T=tokens, c=1, r=1, s=1) for tokens in (64, 4096))
    for cost in ("both_sides", "small_side"):
        assert relative_speed(cost, [few]) < relative_speed(cost, [many]) < 1
    assert relative_speed("full", [few]) == 1


def test_the_documentation_tells_the_predictions_of_this_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    assert "\n".join(predictions()) in page, "put what `python -m experiments.bench --predict` prints there"


def test_fused_lora_is_lora() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5).double().requires_grad_(False)
    layer = FusedLoraLinear(linear, 2)
    nn.init.normal_(layer.B)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        return linear(x) + x @ layer.A.T @ layer.B.T

    wanted = torch.autograd.grad(plain(x).square().sum(), [x, layer.A, layer.B])
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.A, layer.B])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cut_model_keeps_its_widths_and_says_what_was_cut() -> None:
    shape = find_shape("bert_base")
    assert shape.cut(3) == (3, 30522 // 4)
    assert "scaled: 3 of 12 blocks" in shape.label(3)
    assert "all 12 blocks" in shape.label(None)
    with pytest.raises(UserError, match="from 1 to 12"):
        shape.cut(13)


@pytest.mark.parametrize("name", ["tiny", "mlp_tiny", "minilm"])
def test_a_model_has_the_widths_of_its_shape(name: str) -> None:
    shape = SHAPES[name]
    model = build_model(shape, 1, torch.float32)
    shapes = [tuple(linear.weight.shape) for found in mlp_linears(shape, model).values() for linear in found.values()]
    assert shapes == [(shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
    assert model.training
    assert any(shape.is_head(name) for name, _ in model.named_parameters())


def test_a_llama_has_up_and_down_alone() -> None:
    shape = SHAPES["llama_quarter"]
    model = build_model(shape, 1, torch.bfloat16)
    assert list(mlp_linears(shape, model)) == ["up", "down"]


def test_lengths_are_those_of_the_task_and_grouped_when_padded_to_the_longest() -> None:
    assert set(histograms()) == {"cola", "sst2", "mrpc", "rte", "stsb", "snippets"}
    drawn = batch_lengths("mrpc", 32, 128, "max_length", 100, 0)
    mean = sum(map(sum, drawn)) / (32 * 100)
    assert mean == pytest.approx(mean_length("mrpc", 128), rel=0.05)
    assert max(map(max, batch_lengths("rte", 16, 64, "max_length", 20, 0))) == 64
    spread = [max(rows) - min(rows) for rows in batch_lengths("mrpc", 16, 128, "longest", 40, 0)]
    assert sum(spread) / len(spread) < 10  # without grouping about 55
    assert batch_lengths("", 3, 7, "none", 2, 0) == [[7, 7, 7]] * 2
    with pytest.raises(UserError, match="choose one of cola"):
        batch_lengths("qqp", 1, 8, "max_length", 1, 0)


def test_padding_is_masked() -> None:
    batch = token_batch([2, 5], 6, 50, torch.Generator().manual_seed(0))
    assert batch["attention_mask"].sum(1).tolist() == [2, 5]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 1).all()
    assert (batch["input_ids"][batch["attention_mask"] == 1] >= 4).all()


def test_reflections_are_orthogonal_dense_and_of_the_models_shapes(tmp_path: Path) -> None:
    path = reflections.write(find_shape("tiny"), tmp_path / "bases.safetensors")
    bases = load_bases(path)
    assert {kind: basis.shape for kind, basis in bases.items()} == {"intermediate": (128, 32), "output": (32, 128)}
    for basis in bases.values():
        for Q in (basis.in_basis, basis.out_basis):
            assert Q is not None
            assert torch.allclose(Q.T @ Q, torch.eye(len(Q)), atol=1e-5)
            assert (Q != 0).all()
    before = path.stat().st_mtime_ns
    reflections.write(find_shape("tiny"), path)
    assert path.stat().st_mtime_ns == before  # made once


def test_the_gradients_of_fused_lora_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64)
    shapes = ((3, 4), (5,), (2, 4), (5, 2))  # x, bias, A, B
    arguments = tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(lambda x, bias, A, B: _FusedLora.apply(x, weight, bias, A, B).sin(), arguments)
