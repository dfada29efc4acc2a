"""What a stopped or repeated run may take over from an earlier one, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_fixtures import Composer, Tiny, write_rows
from test_runs import Stop, curves

from sparsegrad.basis import Basis, load_bases, save_bases
from sparsegrad.errors import ResourceError, UserError
from sparsegrad.hashing import file_sha256
from sparsegrad.models.source import Source, Sources
from sparsegrad.runs import method_setup, parts
from sparsegrad.runs.config import build
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder
from sparsegrad.trainer.checkpoints import read_manifest, seal


def interrupted(config, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(step)])


def test_a_checkpoint_of_other_data_is_neither_continued_nor_deleted(tiny: Tiny, tmp_path: Path) -> None:
    interrupted(tiny(), 3)
    other = f"data.dir={write_rows(tmp_path / 'other', train=20)}"
    with pytest.raises(ResourceError, match=r"to step 2, .*other data \(fingerprint .*restore .*name=.*resume=false"):
        run(tiny(other))
    named = Stop()
    run(tiny(other, "name=named"), callbacks=[named])
    assert named.began == 0
    again = Stop()
    run(tiny(), callbacks=[again])  # with the data of before
    assert again.began == 2


def test_resume_false_takes_other_data(tiny: Tiny, tmp_path: Path) -> None:
    interrupted(tiny(), 3)
    other, again = f"data.dir={write_rows(tmp_path / 'other', train=20)}", Stop()
    record, _ = run(tiny(other, "resume=false"), callbacks=[again])
    assert again.began == 0
    assert record["data"]["train_rows"] == 20
    assert record["config"]["data"]["dir"] == "other", "records are shared: the path of this machine stays out"


def test_a_file_of_bases_stands_for_its_content(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "bases.safetensors"
    overrides = ("method=sparsegrad", f"method.basis={path}", "protocol.eval_steps=1")
    config = tiny(*overrides)

    def write(shift: int) -> None:
        inner, outer = (torch.eye(size).roll(shift, 0) for size in (32, 64))  # orthogonal
        save_bases(path, {"intermediate": Basis(inner, outer), "output": Basis(outer, inner)})

    write(1)
    interrupted(config, 2)
    write(2)
    with pytest.raises(ResourceError, match=r"another content of method\.basis=.*restore .*resume=false"):
        run(config)
    again = Stop()
    record, _ = run(tiny(*overrides, "resume=false"), callbacks=[again])
    assert again.began == 0, "a checkpoint of other bases was continued"
    assert record["calibration"] == {"file": str(path), "sha256": file_sha256(path)}
    write(3)
    with pytest.raises(UserError, match=rf"another content of method\.basis={path} .*name=, or force=true"):
        run(config)
    path.unlink()
    assert run(config) == (record, False)


@pytest.mark.parametrize("engine", ["exact", "layer"])
def test_a_continued_run_keeps_its_bases_though_the_store_changed(tiny: Tiny, engine: str) -> None:
    """Calibrated anew, trailing directions could turn, and the layer's rotated weights would mean something else."""
    overrides = ("method=sparsegrad", f"method.engine={engine}")
    config = tiny(*overrides)
    whole, _ = run(config)
    config.record_path.unlink()
    interrupted(config, 3)
    (stored,) = (config.run_folder.parent / "bases").iterdir()
    bases = load_bases(stored)
    turned = {kind: type(basis)(-basis.in_basis.flip(1), basis.out_basis.flip(1)) for kind, basis in bases.items()}
    save_bases(stored, turned, stored.stem)
    again = Stop()
    resumed, _ = run(config, callbacks=[again])
    assert again.began == 2
    assert curves(resumed) == curves(whole)


@pytest.mark.parametrize(
    "change",
    [
        "model.mlp={intermediate: '.*layer.0.intermediate.dense', output: '.*layer.0.output.dense'}",
        "+model.architecture.hidden_act=relu",
        "seed=1",
        "train.batch_size=3",
        "method.steps=3",
        "model.pooling=mean",
    ],
)
def test_a_stored_basis_is_not_taken_for_another_calibration(tiny: Tiny, change: str) -> None:
    first, _ = run(tiny("method=sparsegrad"))
    second, _ = run(tiny("method=sparsegrad", change))
    assert not first["calibration"]["reused"]
    assert not second["calibration"]["reused"]


def test_a_calibration_under_autocast_has_bases_of_its_own(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its weights have the same bits: those of a checkpoint in bfloat16 that train are made float32."""
    load = parts.load_model

    def rounded(config, task, tokenizer, dtype, source):
        return load(config, task, tokenizer, torch.float32, source).to(torch.bfloat16).to(dtype)

    monkeypatch.setattr(parts, "load_model", rounded)
    first, _ = run(tiny("method=sparsegrad"))
    assert not run(tiny("method=sparsegrad", "train.precision=bf16_weights"))[0]["calibration"]["reused"]
    third, _ = run(tiny("method=sparsegrad", "train.precision=bf16"))  # of the training alone
    assert third["calibration"]["fingerprint"] == first["calibration"]["fingerprint"]


@pytest.mark.parametrize(
    ("overrides", "processes", "names"),
    [
        ((), 2, set()),
        (("model.pooling=cls",), 1, {"pooling"}),
        (("train.precision=bf16_weights",), 1, {"precision"}),
        (("task=qnli",), 1, set()),
        (("task=qnli", "task.columns=[sentence,question]"), 1, {"columns"}),
        (("model.tokenizer=asset:other",), 1, {"source"}),
        (("model.trust_remote_code=true",), 1, {"source"}),
        (("task=oasst1",), 1, set()),
        (("task=oasst1",), 2, {"processes"}),
    ],
)
def test_what_few_runs_set_is_in_the_name_of_their_bases_alone(
    conf: Composer, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], processes: int, names: set[str]
) -> None:
    monkeypatch.setattr(method_setup, "world_size", lambda: processes)
    sources = Sources(Source("files:1"), Source("files:2"))
    assert set(method_setup._unusual_facts(build(conf(*overrides)), sources)) == names


def test_a_stored_basis_is_taken_for_the_same_calibration(tiny: Tiny) -> None:
    first, _ = run(tiny("method=sparsegrad"))
    second, _ = run(tiny("method=sparsegrad", "train.lr=3e-4"))
    assert second["calibration"]["reused"]
    assert second["calibration"]["fingerprint"] == first["calibration"]["fingerprint"]


def test_a_finished_run_is_skipped_where_its_data_is_not_at_hand(tiny: Tiny, tmp_path: Path) -> None:
    first, _ = run(tiny())
    second, is_new = run(tiny(f"data.dir={tmp_path / 'nowhere'}"))
    assert not is_new
    assert second == first


def test_force_keeps_a_saved_model_until_it_has_a_new_one(tiny: Tiny) -> None:
    config = tiny("save_model=true")
    run(config)
    interrupted(tiny("save_model=true", "force=true"), 3)
    assert (model_folder(config) / "model.safetensors").is_file()


def test_the_record_names_the_code_that_was_started(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsegrad.runs import environment

    commits = iter([{"commit": "first"}, {"commit": "second"}])
    monkeypatch.setattr(environment, "_git", lambda: next(commits))
    record, _ = run(tiny())
    assert record["environment"]["git"] == {"commit": "first"}
    assert record["environment"]["started"] <= record["environment"]["finished"]


def test_the_record_names_the_code_of_every_process_that_trained(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsegrad.runs import environment

    commits = [{"commit": name, "dirty": name == "second"} for name in ("first", "second", "third", "fourth")]
    left = iter(commits)
    monkeypatch.setattr(environment, "_git", lambda: next(left))
    config = tiny("protocol.max_steps=8")
    interrupted(config, 1)  # wrote no checkpoint, so none of its steps counts
    interrupted(config, 5)
    monkeypatch.setattr(environment, "hardware", lambda device: {"device": "cpu", "cpu": "another"})
    interrupted(config, 7)
    found = run(config)[0]["environment"]
    assert found["git"] == commits[3]
    second, third = found["continued_from"]
    assert [(one["first_step"], one["last_step"], one["git"]) for one in (second, third)] == [
        (1, 4, commits[1]),
        (5, 6, commits[2]),
    ]
    assert second["hardware"]["cpu"] != "another"
    assert {"versions", "hardware"}.isdisjoint(third), "they are those of the last process"
    assert second["started"] <= third["started"] <= found["started"]
    assert environment.has_changed_code(found)
    assert not environment.has_changed_code({**found, "continued_from": [third]})


def test_of_a_checkpoint_of_an_earlier_version_only_the_steps_are_known(tiny: Tiny) -> None:
    config = tiny()
    interrupted(config, 3)
    checkpoint = config.checkpoints / "checkpoint-2"
    stored = read_manifest(checkpoint)
    seal(checkpoint, {"unlogged": stored["unlogged"]})
    record, _ = run(config)
    assert record["environment"]["continued_from"] == [{"first_step": 1, "last_step": 2}]
    assert record["environment"]["seconds"] is None
    assert record["memory"]["resident_mib"] > 0


def test_the_core_that_fused_adamw_trains_reaches_the_weight(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step does not count as a write, by which the layer knows what to merge."""
    from sparsegrad.layers.block import BlockLinear
    from sparsegrad.runs import runner as runs

    layers: list[BlockLinear] = []
    made = runs.make_trainer

    def make_trainer(config, model, *rest, **more):
        layers.extend(module for module in model.modules() if isinstance(module, BlockLinear))
        return made(config, model, *rest, **more)

    monkeypatch.setattr(runs, "make_trainer", make_trainer)
    run(tiny("method=sparsegrad_fast"))
    assert len(layers) == 4
    for layer in layers:
        assert layer.core.detach().abs().max() > 0
        assert layer.core.equal(layer.merged)
