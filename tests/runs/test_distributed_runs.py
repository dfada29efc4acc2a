"""Runs of several connected processes: the record of one process with the same global batch, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from llama_fixtures import LLAMA, tree, write_trees
from process_group import together
from run_fixtures import ROOT, SHORT, TINY, last_wins, write_rows
from safetensors.numpy import load_file
from transformers import TrainerCallback

from sparsegrad.distributed import rank
from sparsegrad.errors import UserError
from sparsegrad.runs import saving
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder
from sparsegrad.trainer.callbacks import LossWatch

NO_DROPOUT = ("+model.architecture.hidden_dropout_prob=0", "+model.architecture.attention_probs_dropout_prob=0")
BERT = (*TINY, *SHORT, *NO_DROPOUT, "train.lr=1e-4")
# The authors' calibration trains: float32 rounding grows before the first step. test_distributed.py has it in float64.
# MeProp too is there only: its layers need nothing of a run.
METHODS = ("full", "lora", "sparsegrad", "sparsegrad_fast")
LAYER = ("method=sparsegrad", "method.engine=layer")

Case = tuple[str, ...]


def config(*overrides: str) -> RunConfig:
    chosen = last_wins(*overrides)
    if any(name.startswith("method=sparsegrad") for name in chosen):
        chosen.append("method.steps=6")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return build(compose("config", chosen))


class At(TrainerCallback):  # type: ignore[misc]
    """At a step, on one process or (-1) on all: Ctrl-C, or a kill."""

    def __init__(self, step: int, number: int = signal.SIGINT, process: int = -1) -> None:
        self.step, self.number, self.process, self.began = step, number, process, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and self.process in (-1, int(os.environ.get("RANK", "0"))):
            if self.number == signal.SIGINT:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.number)


class Lose(TrainerCallback):  # type: ignore[misc]
    """Deletes a part of the best checkpoint before training ends."""

    began = -1

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps and state.is_world_process_zero:
            next(Path(state.best_model_checkpoint).glob("*.distcp")).unlink()


def outcome(case: Case, callback: At | Lose | None = None) -> dict[str, Any]:
    """What a run ends with: its curves and weights, or what it was refused or interrupted with."""
    chosen = config(*case, "save_model=true")
    try:
        record, _ = run(chosen, callbacks=[callback] if callback else [])
    except UserError as error:
        return {"error": str(error), "silent": error.silent}
    except KeyboardInterrupt:
        return {"error": "interrupted", "silent": False}
    return {
        "losses": [row["loss"] for row in record["losses"]],
        "evaluations": [[row.get("nll", row["loss"]), row.get("accuracy", 0.0)] for row in record["evaluations"]],
        "weights": load_file(model_folder(chosen) / "model.safetensors"),
        "calibration": record["calibration"],
        "began": callback.began if callback else None,
    }


def outcomes(cases: dict[str, Case]) -> dict[str, Any]:
    return {name: outcome(case) for name, case in cases.items()}


def at(case: Case, step: int, number: int = signal.SIGINT, process: int = -1) -> dict[str, Any]:
    return outcome(case, At(step, number, process))


def assert_same(found: dict[str, Any], wanted: dict[str, Any], most: float, what: str) -> None:
    assert "error" not in found, (what, found)
    for part in ("losses", "evaluations"):
        assert np.allclose(found[part], wanted[part], atol=most, rtol=0), (what, part, found[part], wanted[part])
    for name, weight in wanted["weights"].items():
        assert np.abs(found["weights"][name] - weight).max() <= most, (what, name)


def places(folder: Path) -> Case:
    return f"results_dir={folder / 'results'}", f"work_dir={folder / 'work'}"


@pytest.fixture
def bert(tmp_path: Path) -> Case:
    """22 rows: the last of three batches of 8 has 6, of which the second of two processes has 2."""
    return (*BERT, f"data.dir={write_rows(tmp_path, train=22, validation=11)}", *places(tmp_path))


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    """9 conversations of unequal length, in batches of 4."""
    trees = [tree(number, text="what is two and two " * (1 + number % 3)) for number in range(9)]
    data = write_trees(tmp_path / "trees.jsonl", trees)
    return (*LLAMA, f"data.dir={data}", "train.lr=1e-4", *places(tmp_path))


def test_runs_of_two_processes_are_those_of_one_with_the_same_global_batch(bert: Case, llama: Case) -> None:
    """Rows, their order, an uneven last batch, accumulation, evaluation; bases from the store that one filled."""
    language = (*llama, "method=full", "protocol.max_steps=6", "protocol.eval_steps=3")
    cases = {
        **{name: (*bert, f"method={name}") for name in METHODS},
        "accumulated": (*bert, "method=full", "train.grad_accumulation=2", "seed=5"),
        "grouped": (*bert, "method=full", "train.group_by_length=shuffled"),
        "language accumulated": (*language, "train.grad_accumulation=2", "seed=5"),
    }
    sizes = {name: 2 if name == "accumulated" else 1 if "language" in name else 4 for name in cases}
    whole = outcomes({name: (*case, f"train.batch_size={2 * sizes[name]}") for name, case in cases.items()})
    first, second = together(
        2, outcomes, {name: (*case, f"train.batch_size={sizes[name]}") for name, case in cases.items()}
    )
    for name, wanted in whole.items():
        assert_same(first[name], wanted, 1e-5, name)
        assert_same(second[name], first[name], 0, name)
    assert first["sparsegrad"]["calibration"]["reused"]


def sharded(case: Case, elsewhere: Case) -> dict[str, Any]:
    """Runs with shards: whole; and interrupted and continued."""
    case = (*case, "method=sparsegrad_fast", "train.parallel=fsdp2")
    whole = outcome((*case, *elsewhere))
    return {"whole": whole, "stopped": at(case, 3)["error"], "continued": at(case, 0)}


def test_sharded_runs_are_those_of_one_process_and_continue(bert: Case, tmp_path: Path) -> None:
    # Elsewhere, since its stored bases are those of the others up to rounding only.
    wanted = outcome((*bert, "method=sparsegrad_fast", "train.batch_size=8", *places(tmp_path / "alone")))
    for found in together(2, sharded, (*bert, "train.batch_size=4"), places(tmp_path / "whole")):
        assert_same(found["whole"], wanted, 1e-5, "sharded")
        assert found["stopped"] == "interrupted"
        assert found["continued"]["began"] == 2
        assert_same(found["continued"], found["whole"], 0, "continued")


def test_a_sharded_run_whose_best_checkpoint_was_lost_says_so_once(bert: Case) -> None:
    case = (*bert, "method=sparsegrad_fast", "train.parallel=fsdp2", "train.batch_size=4")
    found = together(2, outcome, case, Lose())
    assert all("has been damaged or deleted since it was written" in one["error"] for one in found)
    assert [one["silent"] for one in found] == [False, True]


def refusals(case: Case) -> list[str]:
    """Settings, engines and seeds that several processes cannot have, one after the other."""
    found = [
        outcome((*case, *LAYER))["error"],
        outcome((*case, "method=sparsegrad", "method.release_gradients=true"))["error"],
        outcome((*case, "method=full", "train.group_by_length=true"))["error"],
        outcome((*case, "method=full", f"seed={os.environ['RANK']}"))["error"],
    ]
    found += [outcome((*case, "method=sparsegrad", f"method.sides={sides}", "train.parallel=fsdp2"))["error"]
              for sides in ("both", "small")]  # fmt: skip
    for engine, version in (("FSDP", "1"), ("FSDP", "2"), ("DEEPSPEED", "1")):
        os.environ |= {f"ACCELERATE_USE_{engine}": "true", "FSDP_VERSION": version}
        found.append(outcome((*case, "method=full"))["error"])
        del os.environ[f"ACCELERATE_USE_{engine}"]
    return found


def test_what_several_processes_cannot_do_is_refused(bert: Case) -> None:
    for layer, released, by_length, seeds, exact, small, fsdp1, fsdp, deepspeed in together(2, refusals, bert):
        assert "method.engine=layer is not allowed with several processes" in layer
        assert "method.release_gradients=true is not allowed with several processes" in released
        assert "train.group_by_length=true is not allowed with several processes" in by_length
        assert "give shuffled" in by_length
        assert "the configuration differs between the processes" in seeds
        assert "start all with the same command" in seeds
        for sharded_exact in (exact, small):
            assert "train.parallel=fsdp2 is not allowed with method=sparsegrad" in sharded_exact
            assert "use method=sparsegrad_fast" in sharded_exact
        assert "FSDP1 is not allowed" in fsdp1
        assert "FSDP is not allowed with train.parallel=ddp: add train.parallel=fsdp2" in fsdp
        assert "DeepSpeed is not allowed" in deepspeed


def test_a_run_is_continued_by_as_many_processes_and_by_no_other_number(bert: Case, tmp_path: Path) -> None:
    """An epoch has 3 steps: the run goes on in the middle of its second, whose order it needs."""
    case = (*bert, "method=sparsegrad", "train.group_by_length=shuffled", "protocol.max_steps=6")
    whole = together(2, outcome, (*case, *places(tmp_path / "whole")))[0]
    assert [found["error"] for found in together(2, at, case, 5)] == ["interrupted"] * 2
    assert "is of this run with 2 processes, and cannot be continued by 1" in outcome(case)["error"]
    first, second = together(2, at, case, 0)
    assert first["began"] == second["began"] == 4
    assert_same(first, whole, 0, "continued by two")
    assert at((*case, "seed=7"), 3)["error"] == "interrupted"
    for found in together(2, outcome, (*case, "seed=7")):
        assert "with 1 process, and cannot be continued by 2" in found["error"]
        assert "start 1 process, or begin anew with resume=false" in found["error"]
    assert "weights" in outcome((*case, "seed=7", "resume=false"))


def poisoned(case: Case, step: int, process: int) -> dict[str, Any]:
    """A run in which the loss of one process becomes NaN at a step."""
    add = LossWatch.add

    def spoil(watch: LossWatch, loss: torch.Tensor) -> None:
        add(watch, loss * float("nan") if watch._count == step - 1 and rank() == process else loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossWatch, "add", spoil)
        return outcome(case)


def test_a_bad_loss_of_another_process_fails_the_run_once(bert: Case, tmp_path: Path) -> None:
    case = (*bert, "method=full", "protocol.max_steps=20", "protocol.eval_steps=5")
    found = together(2, poisoned, case, 9, 1)
    assert all("not a finite number at step 9: training diverged" in one["error"] for one in found)
    assert [one["silent"] for one in found] == [False, True]
    (record,) = (tmp_path / "results").rglob("*.json")
    assert json.loads(record.read_text())["status"] == "failed"
    assert not list((tmp_path / "work").glob("*/checkpoints"))


def short_of_memory(case: Case) -> dict[str, Any]:
    """A run whose model cannot be saved for lack of memory."""

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_save_model", run_out)
        return outcome(case)


def test_a_lack_of_memory_while_saving_is_told_once_and_costs_no_training(bert: Case) -> None:
    case = (*bert, "method=lora")
    found = together(2, short_of_memory, case)
    assert all("memory is too small to save" in one["error"] for one in found)
    assert [one["silent"] for one in found] == [False, True]
    assert [one["began"] for one in together(2, at, case, 0)] == [-1, -1], "nothing is left to train"


@pytest.mark.parametrize("dies", [0, 1])
def test_the_processes_that_are_left_end_soon_and_one_says_why(bert: Case, dies: int) -> None:
    """The killed one returns nothing."""
    case = (*bert, "method=sparsegrad", "protocol.max_steps=60")
    left = together(3, at, case, 7, signal.SIGKILL, dies, missing=1, seconds=60)
    assert len(left) == 2
    assert all("lost the connection to another, which has ended" in found["error"] for found in left)
    assert [found["silent"] for found in left].count(False) == 1
