"""What a finished run keeps besides its record: the whole model, or what training changed in it as an adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegrad.adapter.card import remove_card
from sparsegrad.adapter.folder_lock import remove_files
from sparsegrad.adapter.format import ADAPTER
from sparsegrad.adapter.lora import write_matrices
from sparsegrad.adapter.lora_files import LORA
from sparsegrad.adapter.save import write_changes
from sparsegrad.distributed import from_main, gathered, on_main
from sparsegrad.errors import ResourceError, UserError, fail, first_line
from sparsegrad.files import share_tensors
from sparsegrad.layers.replace import merge_shards
from sparsegrad.methods.base import Prepared
from sparsegrad.models.loading import load_model
from sparsegrad.models.source import Sources
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.parts import Parts
from sparsegrad.runs.run_folder import noted_as_unsaved

MAX_ERROR = 0.05  # of a LoRA whose rank is not given: relative, per weight


def model_folder(config: RunConfig) -> Path:
    """The folder of the model that `save_model` asks for; it stays, as a result."""
    return Path(config.results_dir) / "models" / config.name / config.key


def check_saving(config: RunConfig) -> None:
    """What is asked to be saved can be: an adapter needs a base that others have too, and peft's a method of peft."""
    if config.save_adapter == "peft":
        _check_peft(config)
    if config.save_adapter is not None and config.model.weights == "random":
        raise fail("save_adapter", config.save_adapter, "a model of random weights has no base", "use null")
    if config.model.pooling == "mean" and (config.save_model or config.save_adapter is not None):
        what = "save_model" if config.save_model else "save_adapter"
        value = config.save_model if config.save_model else config.save_adapter
        raise fail(what, value, "with model.pooling=mean the saved model would pool otherwise", "use false or null")


def _check_peft(config: RunConfig) -> None:
    """Check what `save_adapter=peft` needs, except for what only the wrapped model shows: see `method_setup`."""
    if not getattr(config.method, "saves_peft", False):
        what = f"method={config.method.name} is not one of peft's"
        raise fail("save_adapter", "peft", what, "use save_adapter=lora, or a method=peft/...")
    if config.train.train_rest:
        what = "an adapter of peft does not hold the rest of the model, which trains too"
        remedy = "set train.train_rest=false, or, if peft can merge the method, use save_adapter=lora"
        raise fail("save_adapter", "peft", what, remedy)


def save_results(config: RunConfig, parts: Parts, prepared: Prepared, sources: Sources) -> None:
    """Save what `save_model` and `save_adapter` ask for; the model has ordinary linears afterwards, and cannot train.

    Raises:
        ResourceError: when that is not possible, with the way to save later. The caller writes no record and keeps the
            checkpoints, from which the next call saves.
    """
    _free_training(prepared)
    try:
        with noted_as_unsaved(config):
            _save(config, parts, prepared, sources)
    except UserError as error:
        failure = ResourceError(f"{error} ({_describe_retry(config)})")
        failure.silent = error.silent
        raise failure from error


def _describe_retry(config: RunConfig) -> str:
    """How to save from the checkpoints of a run that could not save, and how to do without."""
    anew = {"force=true": config.force, "resume=false": not config.resume}
    less = "".join(f" without {name}" for name, is_given in anew.items() if is_given)
    asked = {
        "save_model=false": config.save_model,
        "save_adapter=null": config.save_adapter,
        "adapter_rank=null": config.adapter_rank,
    }
    nothing = " ".join(name for name, is_asked in asked.items() if is_asked)
    return (
        f"the training is done and its checkpoints are kept: the same command{less} saves from them; with "
        f"{nothing} it ends without saving"
    )


def _free_training(prepared: Prepared) -> None:
    """Free what only training needs: merging makes weights float32, which may take more memory than a step did."""
    prepared.optimizer.zero_grad()
    prepared.optimizer.state.clear()


@contextmanager
def _explained_memory() -> Iterator[None]:
    """Within: a lack of memory becomes an error for the user, of which `from_main` tells all processes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        what = f"the memory is too small to save ({first_line(error)})"
        raise ResourceError(f"{what}: free memory, or, on a GPU, save on the CPU with train.device=cpu") from error


@_explained_memory()
def _save(config: RunConfig, parts: Parts, prepared: Prepared, sources: Sources) -> None:
    # The layers of engine fast hold the factors of their change, so they are saved as LoRA before they become linears.
    exact = getattr(config.method, "holds_factors", False)
    if config.save_adapter == "lora" and exact:
        _write_whole(parts, lambda: _save_lora(config, parts, sources, max_error=None))
    if config.save_adapter == "peft":
        assert prepared.save is not None  # `check_saving` and `prepare_method` have checked it
        save = prepared.save
        _named(config, parts)
        _write_whole(parts, lambda: _write_adapter(config, save))
    prepared.finish()
    _write_whole(parts, lambda: _save_linears(config, parts, sources, exact))


def _write_whole(parts: Parts, write: Callable[[], object]) -> None:
    """Let the main process write, with whole weights if the model is sharded; all processes call this."""
    merge_shards(parts.model)
    with gathered(parts.model):
        from_main(_explained_memory()(write))


def _save_linears(config: RunConfig, parts: Parts, sources: Sources, exact: bool) -> None:
    """What is saved of a model with ordinary linears; `exact`: its LoRA adapter is written already."""
    if config.save_adapter == "lora" and not exact:
        _save_lora(config, parts, sources, max_error=MAX_ERROR if config.adapter_rank is None else None)
    if config.save_adapter == "sparsegrad":
        base, model = _base_tensors(config, parts, sources), _named(config, parts)
        _write_adapter(config, lambda folder: write_changes(model, folder, base, target_modules=config.model.mlp))
    if config.save_model:
        _save_model(config, parts)


def _save_lora(config: RunConfig, parts: Parts, sources: Sources, max_error: float | None) -> None:
    base, model = _base_tensors(config, parts, sources), _named(config, parts)
    rank = config.adapter_rank
    _write_adapter(config, lambda folder: write_matrices(model, folder, base, rank=rank, max_error=max_error))


def _write_adapter(config: RunConfig, write: Callable[[Path], object]) -> None:
    """Let `write` make the adapter. One of the other format stays, complete, until it has; then its files go."""
    folder = config.adapter_folder
    write(folder)
    remove_files(folder, LORA if config.save_adapter == "sparsegrad" else ADAPTER)
    if config.save_adapter == "peft":
        remove_card(folder)  # of an earlier adapter: peft's has none


@on_main
def restore_adapter(config: RunConfig) -> None:
    """Undo an exchange of formats in which an earlier version was killed: it put the whole folder aside."""
    folder = config.adapter_folder
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    if (old / folder.name).is_dir() and not folder.exists():
        (old / folder.name).rename(folder)
    if folder.is_dir():
        for scratch in (new, old):
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _scratch(folder: Path, word: str) -> Iterator[Path]:
    """Within: an empty folder beside `folder`, on the same file system."""
    scratch = folder.with_name(f".{folder.name}.{word}")  # the same name each time: one that a killed process left goes
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _named(config: RunConfig, parts: Parts) -> Any:
    """The model, which names its source: cards and configurations of adapters name their base by it."""
    model: Any = parts.model
    model.config._name_or_path = config.model.source.removeprefix("asset:")
    return model


def _base_tensors(config: RunConfig, parts: Parts, sources: Sources) -> dict[str, Tensor]:
    """The model's tensors before training, on the CPU, without those of its head, which no base has."""
    dtype = torch.bfloat16 if config.train.precision == "bf16_weights" else torch.float32
    with torch.random.fork_rng():
        fresh = load_model(config.model, config.task, parts.tokenizer, dtype, sources.model)
    has_head = not config.task.is_language and not config.model.keep_head
    trained = parts.model.state_dict()
    return {
        # What trains is float32, also where the model was loaded in bfloat16.
        name: tensor.to(trained[name].dtype)
        for name, tensor in fresh.state_dict().items()
        if not (has_head and config.model.is_head(name))
    }


def _save_model(config: RunConfig, parts: Parts) -> None:
    """Write the fine-tuned model, as ordinary linears, and its tokenizer.

    An earlier one stays until all files are written; files of other names stay in any case.
    """
    model: Any = parts.model
    folder = model_folder(config)
    with _scratch(folder, "new") as fresh:
        model.save_pretrained(fresh)
        if config.train.precision == "bf16_weights":  # named by the first weight; what was trained is float32
            model.config.dtype = torch.float32
            model.config.save_pretrained(fresh)
        parts.tokenizer.save_pretrained(fresh)
        share_tensors(fresh, like="config.json")
        folder.mkdir(exist_ok=True)
        for path in fresh.iterdir():
            if path.is_dir():  # such as the chat templates of a tokenizer; a rename replaces no folder that has files
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
