"""Several connected processes, by `prepare` or a method and DDP: the same path as one process, and what travels."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_cases import (
    METHODS,
    payloads,
    refused_by_the_library,
    refused_shards,
    saved,
    walk_all,
    walk_fast_bfloat16,
    walk_prepared,
)
from process_group import together
from torch import distributed as dist

from sparsegrad.basis import Basis
from sparsegrad.runs.basis_cache import BasisStore

pytestmark = pytest.mark.xdist_group("distributed")  # its fixtures take long: one worker makes them


def assert_equal(found: dict[str, Any], wanted: dict[str, Any], most: float, what: str) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= most, f"{what}: {name}"


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Every method by one process with the whole batch."""
    return walk_all()


@pytest.mark.parametrize("count", [2, 4])
def test_every_method_walks_the_path_of_one_process_in_float64(count: int, alone: dict[str, Any]) -> None:
    """Losses and all weights to 1e-10; bases and kept entries the same on every process, bit for bit."""
    each = together(count, walk_all)
    for name in METHODS:
        wanted, first = alone[name], each[0][name]
        assert np.allclose(first["losses"], wanted["losses"], atol=1e-10, rtol=0), name
        assert_equal(first["weights"], wanted["weights"], 1e-10, name)
        for other in (one[name] for one in each):
            for part in ("weights", "bases", "touched"):
                assert_equal(
                    {key: value.astype(float) for key, value in other[part].items()},
                    {key: value.astype(float) for key, value in first[part].items()}, 0, f"{name} {part}",
                )  # fmt: skip
    assert all(
        len(alone[name]["bases"]) == 2 for name in METHODS if name.startswith("sparsegrad") and "small" not in name
    )
    touched = alone["sparsegrad"]["touched"].values()
    assert all(0 < entries.mean() < 0.3 for entries in touched), "all or none would be the same on every process"
    moved = [np.abs(alone[name]["losses"][0] - alone[name]["losses"][-1]) for name in METHODS]
    assert min(moved) > 1e-4, "a model that does not move proves nothing"


@pytest.mark.parametrize("wrap_first", [False, True])
def test_prepare_and_ddp_in_either_order(wrap_first: bool) -> None:
    wanted = walk_prepared(torch.float64, wrap_first=False)
    for found in together(2, walk_prepared, torch.float64, wrap_first):
        assert found["names"] == wanted["names"]
        assert np.allclose(found["losses"], wanted["losses"], atol=1e-10, rtol=0)
        assert_equal(found["weights"], wanted["weights"], 1e-10, "")


def test_calibrated_bases_stay_on_the_device_of_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent by pickle from the main process's GPU, they would be on that GPU in every process."""
    pickled: list[bytes] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, src: pickled.append(pickle.dumps(objects)))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.fill_(7))
    own = tmp_path / "own.safetensors"
    store = BasisStore(folder=tmp_path, model=torch.nn.Linear(2, 2), facts={}, own=own, resuming=False)
    bases, _ = store.calibrated({"steps": 1}, lambda: {"up": Basis(torch.eye(2).T, None)})
    assert pickled
    assert not any(b"Basis" in sent for sent in pickled)
    assert torch.equal(bases["up"].in_basis, torch.full((2, 2), 7.0))


def bfloat16() -> dict[str, Any]:
    return {"exact": walk_prepared(torch.bfloat16, wrap_first=False), "fast": walk_fast_bfloat16()}


def test_weights_in_bfloat16_stay_the_same_on_every_process() -> None:
    """They are rounded at random, from noise that does not depend on the process's own generator."""
    first, second = together(2, bfloat16)
    assert first["fast"]["moved"] > 100
    for engine in ("exact", "fast"):
        assert_equal(second[engine]["weights"], first[engine]["weights"], 0, engine)


def test_of_the_mlp_weights_the_fast_engine_sends_the_core_alone() -> None:
    first, second = together(2, payloads)
    assert first == second
    for name, counted in first.items():
        assert counted["per_step"] == counted["mlp"] + counted["head"], name
    dense = first["full"]["mlp"]
    assert first["sparsegrad"]["mlp"] == first["meprop"]["mlp"] == dense  # what is kept, only the sum tells
    assert first["sparsegrad_fast"]["mlp"] == 4 * 4 * 7 * 4, "four cores (7, 4) or (4, 7) in float32"


def test_what_two_processes_saved_one_continues_and_the_other_way_round(tmp_path: Path) -> None:
    """With the same global batch: model and optimizer are whole on every process."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    saved(str(tmp_path / "one"), 3, True)
    wanted = saved(str(tmp_path / "one"), 3, False)
    together(2, saved, str(tmp_path / "two"), 3, True)
    assert_equal(saved(str(tmp_path / "two"), 3, False), wanted, 1e-10, "two, then one")
    for found in together(2, saved, str(tmp_path / "one"), 3, False):
        assert_equal(found, wanted, 1e-10, "one, then two")


def test_another_model_on_each_process_is_refused_before_any_batch_is_read() -> None:
    for differs, released in together(2, refused_by_the_library):
        assert "word_embeddings.weight differs between the processes: make the model with the same seed" in differs
        assert "several processes are averaged after back-propagation" in released


def test_sharded_weights_are_refused_wherever_they_come_in() -> None:
    for refused in together(2, refused_shards):
        assert len(refused) == 3
        for message in refused:
            assert (
                "cut into shards (FSDP, tensor parallelism), which cannot be rotated: train with Distributed" in message
            )
