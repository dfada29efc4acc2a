"""A run whose model or adapter cannot be saved keeps what it has trained, for a later call to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_sources import Made
from test_model_sources import checkpoint as checkpoint  # fixtures
from test_model_sources import made as made
from test_model_sources import source as source
from test_saving import base
from transformers import TrainerCallback

from sparsegrad import load_adapter
from sparsegrad.adapter.format import FACTS
from sparsegrad.errors import ResourceError
from sparsegrad.runs import saving
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder
from sparsegrad.trainer.checkpoints import has_checkpoint


class Away(TrainerCallback):  # type: ignore[misc]
    """Renames the folder of the base when training ends, as if its disk were unmounted; or counts steps alone."""

    def __init__(self, source: Path | None = None) -> None:
        self.source, self.steps = source, 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.source is not None:
            self.source.rename(self.source.with_name("away"))


def fail_to_save(config: RunConfig, source: Path, message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        run(config, callbacks=[Away(source)])
    source.with_name("away").rename(source)
    assert has_checkpoint(config.checkpoints)


def test_what_could_not_be_saved_is_saved_by_the_same_command_without_training(made: Made, source: Path) -> None:
    config = made("method=sparsegrad", "save_adapter=sparsegrad")
    undisturbed = made("method=sparsegrad", "save_adapter=sparsegrad", "name=undisturbed")
    run(undisturbed)
    fail_to_save(config, source, r"cannot be read.*the same command saves from them; with save_adapter=null it ends")
    assert not config.record_path.exists()
    again = Away()
    record, is_new = run(config, callbacks=[again])
    assert (is_new, again.steps, record["status"]) == (True, 0, "complete")
    models = [base(source), base(source)]
    for model, one in zip(models, (config, undisturbed), strict=True):
        load_adapter(model, one.adapter_folder).merge()
    for found, wanted in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(found, wanted)
    assert not config.checkpoints.exists()


def test_what_cannot_be_saved_at_all_is_left_out_by_the_command_that_the_error_names(made: Made, source: Path) -> None:
    asked = ("method=sparsegrad", "save_adapter=lora", "adapter_rank=4", "save_model=true", "resume=false")
    named = "save_model=false save_adapter=null adapter_rank=null"
    fail_to_save(made(*asked), source, rf"the same command without resume=false saves.* with {named} it ends")
    without, again = made("method=sparsegrad", *named.split()), Away()
    record, _ = run(without, callbacks=[again])
    assert (record["status"], again.steps) == ("complete", 0)
    assert not without.checkpoints.exists()


def test_a_forced_run_that_could_not_save_keeps_both_the_record_and_its_checkpoints(made: Made, source: Path) -> None:
    config = made("save_adapter=sparsegrad")
    run(made())
    before = config.record_path.read_text()
    fail_to_save(made("save_adapter=sparsegrad", "force=true"), source, "the same command without force=true saves")
    assert config.record_path.read_text() == before
    again = Away()
    assert run(config, callbacks=[again])[1] is True
    assert (again.steps, (config.adapter_folder / FACTS).is_file()) == (0, True)
    assert run(config)[1] is False


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("where", ["sparsegrad.methods.lora._merge_adapters", "sparsegrad.runs.saving._save_model"])
def test_a_lack_of_memory_while_saving_is_one_line(
    made: Made, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    def run_out(*_: Any) -> None:
        raise error

    config = made("method=lora", "save_model=true")
    with monkeypatch.context() as memory:
        memory.setattr(where, run_out)
        for _ in range(2):
            with pytest.raises(ResourceError, match=r"memory is too small to save.*train\.device=cpu.*same command"):
                run(config)
    again = Away()
    run(config, callbacks=[again])
    assert again.steps == 0
    assert model_folder(config).is_dir()


def test_what_only_training_needs_is_freed_before_the_layers_are_merged(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    save = saving._save

    def watched(config: RunConfig, parts: Any, prepared: Any, *more: Any) -> None:
        gradients = [one for one in parts.model.parameters() if one.grad is not None]
        seen.append(len(gradients) + len(prepared.optimizer.state))
        save(config, parts, prepared, *more)

    monkeypatch.setattr(saving, "_save", watched)
    run(made("method=full", "save_model=true"))
    assert seen == [0]
