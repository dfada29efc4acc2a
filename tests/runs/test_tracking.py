"""Trackers: one run over interruptions, with the experiment as its configuration, and no network."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import Tiny
from transformers import TrainerCallback

from sparsegrad import SparseGradAdamW
from sparsegrad.basis import Basis
from sparsegrad.errors import ResourceError
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.runner import run
from sparsegrad.runs.tracking import hyperparameters, kept_energy, run_title
from sparsegrad.trainer.checkpoints import has_checkpoint

LONG = ("protocol.max_steps=12", "protocol.eval_steps=4", "protocol.patience=null")


class Stop(TrainerCallback):  # type: ignore[misc]
    """Stops a run at step 10, as Ctrl-C does; its last checkpoint is of step 8."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 10:
            raise KeyboardInterrupt


def interrupt_and_resume(config: RunConfig) -> dict[str, Any]:
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop()])
    return run(config)[0]


def test_tensorboard_shows_one_run_with_its_experiment(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(*LONG, "tracker=tensorboard")
    record = interrupt_and_resume(config)
    folder = Path(config.work_dir, "tensorboard")
    assert [one.name for one in folder.iterdir()] == [run_title(config)]
    assert f"tensorboard --logdir {folder}" in capsys.readouterr().err

    found = EventAccumulator(str(folder / run_title(config))).Reload()
    assert [event.step for event in found.Scalars("eval/accuracy")] == [4, 8, 12]  # none twice
    energy = found.Scalars("kept_energy/output")
    assert [event.step for event in energy] == [10]
    assert 0 < energy[0].value < 1
    assert found.Scalars("calibration/seconds")[0].value == pytest.approx(record["calibration"]["seconds"])
    assert found.Scalars("speed/steps_per_second")
    assert found.Scalars("result/accuracy")[0].value == pytest.approx(record["result"]["value"])
    text = found.Tensors("experiment/text_summary")[0].tensor_proto.string_val[0].decode()
    for line in (f"key: {config.key}", "density: 0.01", "engine: exact", f"total: {record['trainable']['total']}"):
        assert line in text
    assert "_hparams_/session_start_info" in found.summary_metadata  # the tab of hyperparameters
    compared = hyperparameters(config, record)
    assert (compared["density"], compared["engine"], compared["trainable"]) == (
        0.01,
        "exact",
        record["trainable"]["total"],
    )


def test_wandb_continues_the_run_of_the_same_key(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    started, finished, logged = [], [], []

    class Run:
        id = "of-the-key"

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, set(values)))
            assert all(isinstance(value, float | int) for value in values.values())

        def finish(self, exit_code: int) -> None:
            finished.append(exit_code)

    def init(**given: Any) -> Run:
        started.append(given)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    config = tiny(*LONG, "tracker=wandb")
    record = interrupt_and_resume(config)
    assert [one["id"] for one in started] == [f"{config.key}-{config.name}"] * 2
    assert {one["resume"] for one in started} == {"allow"}
    assert started[0]["name"] == run_title(config)
    facts = json.loads(json.dumps(started[0]["config"]))  # plain data
    assert (facts["density"], facts["engine"], facts["key"]) == (0.01, "exact", config.key)
    assert facts["record"]["trainable"] == record["trainable"]
    assert finished == [1, 0]  # the first was interrupted
    assert {one["step"] for one in record["evaluations"]} <= {step for step, names in logged if "eval/loss" in names}
    assert f"wandb sync {config.work_dir}/wandb/offline-run-*-of-the-key" in capsys.readouterr().err


def test_the_same_settings_under_two_names_are_two_runs(tiny: Tiny) -> None:
    one, other = tiny("name=one"), tiny("name=an.other.one")
    assert one.key == other.key
    start, end = run_title(one).split("-one-")
    assert re.fullmatch(rf"{re.escape(start)}-an_other_one-[0-9a-f]{{6}}-{end}", run_title(other))


def test_wandb_writes_its_files_without_a_network(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = tiny("tracker=wandb", "protocol.max_steps=2")
    assert run(config)[0]["status"] == "complete"
    assert len(list(Path(config.work_dir).glob(f"wandb/offline-run-*-{config.key}-{config.name}/*.wandb"))) == 1
    assert wandb.run is None  # the next run of this process is another


ONLINE = ("tracker=wandb", "tracker.mode=online")


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """wandb, where nobody has logged in."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal to ask in
    return wandb


def test_an_online_run_without_a_login_is_refused_first(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, logged_out: Any
) -> None:
    monkeypatch.setattr("sparsegrad.runs.parts.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ResourceError, match=r"tracker\.mode=online .*wandb login.*tracker\.mode=offline"):
        run(tiny(*ONLINE))


def test_a_finished_run_needs_no_login(tiny: Tiny, logged_out: Any) -> None:
    record, _ = run(tiny())
    assert run(tiny(*ONLINE)) == (record, False)


def test_an_online_run_whose_server_is_away_keeps_its_checkpoints(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, logged_out: Any
) -> None:
    def refuse(**_: Any) -> None:
        raise logged_out.errors.CommError("no such host\nincrease the timeout")

    stopped = tiny(*LONG)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, callbacks=[Stop()])
    monkeypatch.setattr(logged_out, "login", lambda **_: True)
    monkeypatch.setattr(logged_out, "init", refuse)
    with pytest.raises(ResourceError, match=r"W&B cannot start the run \(no such host\): .*tracker\.mode=offline"):
        run(tiny(*LONG, *ONLINE))
    assert not stopped.record_path.exists()
    assert has_checkpoint(stopped.checkpoints)


def test_kept_energy_is_the_share_of_the_squared_rotated_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    basis = Basis(torch.linalg.qr(torch.randn(3, 3))[0], torch.linalg.qr(torch.randn(4, 4))[0])
    optimizer = SparseGradAdamW([{"params": [weight], "keep": 5, "basis": basis, "kind": "output"}])
    assert kept_energy(optimizer) == {}  # no gradient yet
    weight.grad = torch.randn(4, 3)
    rotated = basis.rotate(weight.grad).flatten().square()
    wanted = float(rotated.sort(descending=True).values[:5].sum() / rotated.sum())
    assert float(kept_energy(optimizer)["output"]) == pytest.approx(wanted, rel=1e-5)
