"""Engine `fast` with weights that FSDP2 shards: the path of one process, checkpoints, adapters, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_cases import batches, bert, loop
from process_group import together
from safetensors.numpy import load_file
from sharded_cases import FAST, STEPS, by_four, dies, end, everything, grams, kept, sharded_first

from sparsegrad import load_adapter, prepare

pytestmark = pytest.mark.xdist_group("fsdp2")  # its fixtures take long: one worker makes them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return together(2, everything, str(folder))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return sharded_first(torch.float64)


def assert_walk(found: dict[str, Any], wanted: dict[str, Any], most: float) -> None:
    assert np.allclose(found["losses"], wanted["losses"], atol=most, rtol=0)
    for core, own in zip(found["cores"], wanted["cores"], strict=True):
        assert np.abs(core - own).max() <= most
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, value in wanted["weights"].items():
        assert np.abs(found["weights"][name] - value).max() <= most, name


@pytest.mark.parametrize("name", ["float64", "columns", "prepared first", "ddp"])
def test_two_processes_walk_the_path_of_one(two: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    """Cut by rows or by columns, before or after `prepare`; and whole weights under DDP."""
    assert abs(alone["losses"][0] - alone["losses"][-1]) > 1e-4, "a model that does not move proves nothing"
    assert_walk(two[0][name], alone, 1e-10)
    assert two[1][name]["losses"] == two[0][name]["losses"]


def test_in_float32_two_processes_walk_the_path_of_one(two: list[dict[str, Any]]) -> None:
    assert_walk(two[0]["float32"], sharded_first(torch.float32), 1e-5)


def test_four_processes_with_uneven_shards_copies_and_the_checkpoint_of_two(
    two: list[dict[str, Any]], alone: dict[str, Any], folder: Path
) -> None:
    found = together(4, by_four, str(folder))[0]
    assert_walk(found["float64"], alone, 1e-10)
    assert_walk(found["copies"], alone, 1e-10)
    model = bert()
    optimizer = prepare(model, batches(), **FAST)
    loop(model, optimizer, STEPS)
    wanted = end(model, loop(model, optimizer, STEPS, first=1), optimizer)
    assert_walk(found["continued"], wanted, 1e-10)
    assert_walk(two[0]["continued"], wanted, 1e-10)


def test_a_sharded_model_gives_the_bases_of_a_whole_one(two: list[dict[str, Any]]) -> None:
    for kind, basis in grams().items():
        for one in two:
            assert np.abs(one["grams"][kind] @ one["grams"][kind].T - np.eye(len(basis))).max() < 1e-10
            assert np.abs(np.abs((one["grams"][kind] * basis).sum(0)) - 1)[:4].max() < 1e-8, kind


def test_adapters_from_shards_are_those_of_a_whole_model(
    two: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    wanted = kept(str(tmp_path))
    for one in two:
        assert one["kept"]["ranks"] == wanted["ranks"]
        assert one["kept"]["errors"] < 1e-5
    base, models, loras = bert(torch.float32).state_dict(), [], []
    for root in (folder, tmp_path):
        models.append(bert(torch.float32))
        load_adapter(models[-1], root / "adapter").merge()
        (file,) = (root / "lora").glob("*.safetensors")
        loras.append(load_file(file))
    for (name, found), wanted in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5), name
    assert any(not torch.equal(value, base[name]) for name, value in models[0].state_dict().items())
    assert loras[0].keys() == loras[1].keys()
    downs = [name for name in loras[0] if ".lora_A." in name]
    assert downs
    for down in downs:  # the factors have signs of their own
        up = down.replace(".lora_A.", ".lora_B.")
        found, wanted = (lora[up] @ lora[down] for lora in loras)
        assert np.abs(found - wanted).max() < 1e-5, down


def test_mixed_precision_leaves_the_cores_alone(two: list[dict[str, Any]]) -> None:
    for one in two:
        assert one["low precision"]["dtypes"] == {"torch.float32"}
        assert min(one["low precision"]["moved"]) > 0


def test_a_gradient_that_is_not_finite_in_one_process_skips_the_step_of_all(two: list[dict[str, Any]]) -> None:
    assert [one["poisoned"] for one in two] == [[1, 1], [1, 1]]


def test_shards_in_bfloat16_are_rounded_stochastically(two: list[dict[str, Any]]) -> None:
    wanted, change = two[0]["bfloat16"]["wanted"], two[0]["bfloat16"]["change"]
    assert np.array_equal(two[1]["bfloat16"]["change"], change)
    # Rounded to nearest, most of each change would be lost.
    assert (change * wanted).sum() / (wanted**2).sum() == pytest.approx(1, abs=0.15)


WORDS = {
    "exact": ["cut into shards", "DistributedDataParallel", 'engine="fast"'],
    "small": ["cut into shards", 'engine="fast"'],
    "tensor parallel": ["tensor parallelism", "fully_shard on each block"],
    "single linears": ["FSDPLinear", "not on single linears"],
    "root alone": ["FSDP2 has gathered this weight", "each block"],
    "rounded": ["rounds the core to torch.bfloat16", "before prepare"],
    "a part": ["a core has changed", "call the whole model"],
    "fsdp1": ["FSDP1", "fully_shard"],
}


@pytest.mark.parametrize("case", WORDS)
def test_what_shards_cannot_do_is_refused(two: list[dict[str, Any]], case: str) -> None:
    for one in two:
        for word in WORDS[case]:
            assert word in one["refused"][case]


def test_shards_that_are_kept_elsewhere_are_refused(two: list[dict[str, Any]]) -> None:
    assert "leave CPUOffloadPolicy out" in two[0]["offloaded"]


def test_a_process_that_dies_while_others_gather_ends_the_job() -> None:
    (left,) = together(2, dies, missing=1, seconds=60)
    assert "lost the connection to another, which has ended" in left
