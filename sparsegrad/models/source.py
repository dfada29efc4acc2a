"""Where a model or tokenizer comes from, and what its files are: an asset, a folder, or a commit of a hub repository.

A name says little: a folder can be changed in place and a branch of the hub moves on. `Source.identity` stands for the
content, and a record with another one is not taken for the same run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from sparsegrad.assets.download import asset_path
from sparsegrad.assets.hub import fetch_files, find_model
from sparsegrad.assets.hub_repository import MODEL_OTHERWISE, SETTINGS, Repository
from sparsegrad.assets.table import ASSETS
from sparsegrad.distributed import from_main, on_main
from sparsegrad.errors import UserError
from sparsegrad.hashing import SHORT, file_sha256, json_sha256
from sparsegrad.models.config import ModelConfig

ASSET = "asset:"
# A model with random weights can have any vocabulary, as its architecture takes the size from the tokenizer.
_OTHER_TOKENIZER = "set model.tokenizer=asset:minilm, which needs no hub and suits a model with random weights"
_OWN_TOKENIZER = "give a folder as model.tokenizer=, or null for the model's own"
# Files that loading may read; the code of a model with model.trust_remote_code=true is one of them.
_CONTENT = ("*.safetensors", "*.bin", *(f"*{ending}" for ending in SETTINGS))


@dataclass(frozen=True)
class Source:
    """A source that exists.

    Attributes:
        identity: `asset:...`, `files:...` or `commit:...` with a hash of the content.
        folder: of the files, where they are on this machine already.
        repository: of the hub, otherwise.
    """

    identity: str
    folder: Path | None = None
    repository: Repository | None = None

    def fetch(self) -> Path:
        """The folder of the files; from the hub, what is missing in the cache is downloaded.

        All processes must call it. The main one downloads, the others then find the files in the cache.
        """
        if self.folder is not None:
            return self.folder
        repository = self.repository
        assert repository is not None
        from_main(lambda: fetch_files(repository))
        return fetch_files(repository)  # on another machine, which may have a cache of its own, this downloads too


@dataclass(frozen=True)
class Sources:
    """The sources of one run; `model` is None for random weights."""

    model: Source | None
    tokenizer: Source

    def as_json(self) -> dict[str, str]:
        """Their identities, for the record."""
        found = {} if self.model is None else {"model": self.model.identity}
        return {**found, "tokenizer": self.tokenizer.identity}


@on_main
def find_sources(config: ModelConfig, *, is_language: bool = False) -> Sources:
    """The sources of a model and its tokenizer, as the main process finds them; nothing large is downloaded.

    Args:
        config: the model.
        is_language: whether it is loaded as a causal language model, for the remedy of an error.

    Raises:
        UserError: when one does not exist, is gated, or is an adapter instead of a model.
    """
    model = None if config.weights == "random" else find_source(config.source, config.revision)
    if model is not None:
        _refuse_adapter(config, model, is_language)
    otherwise = _OTHER_TOKENIZER if model is None else _OWN_TOKENIZER
    if config.tokenizer is not None:
        return Sources(model, find_source(config.tokenizer, weights=False, otherwise=otherwise))
    if model is not None:
        return Sources(model, model)
    return Sources(None, find_source(config.source, config.revision, weights=False, otherwise=otherwise))


def find_source(
    name: str, revision: str | None = None, *, weights: bool = True, otherwise: str = MODEL_OTHERWISE
) -> Source:
    """The source of that name: `asset:NAME`, a folder, or a hub repository, with or without its `weights`.

    Args:
        name: of the source.
        revision: branch, tag or commit of a repository.
        weights: whether its weights are wanted, not only configuration and tokenizer.
        otherwise: how to do without the hub, for the error of a repository that cannot be had.
    """
    if name.startswith(ASSET):
        asset = name.removeprefix(ASSET)
        folder = asset_path(asset)
        return Source(f"asset:{json_sha256([file.sha256 for file in ASSETS[asset].files])[:SHORT]}", folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(f"files:{_hash_folder(folder)}", folder)
    if name.startswith((".", "/", "~")):
        raise UserError(f"model source {name} does not exist: name a folder with config.json and weights, or a hub id")
    repository = find_model(name, revision, weights=weights, otherwise=otherwise)
    return Source(f"commit:{repository.commit}", repository=repository)


def _hash_folder(folder: Path) -> str:
    files = sorted({path for pattern in _CONTENT for path in folder.glob(pattern)})
    if not any(path.suffix == ".json" for path in files):
        raise UserError(f"folder {folder} holds neither model nor tokenizer: name one that `save_pretrained` wrote")
    try:
        return json_sha256([[path.name, file_sha256(path)] for path in files])[:SHORT]
    except OSError as error:
        raise UserError(f"model folder {folder} cannot be read: {error.strerror}") from None


def _refuse_adapter(config: ModelConfig, source: Source, is_language: bool) -> None:
    """Refuse an adapter of peft: the run would train to its end and then have no whole model to save."""
    repository, about = source.repository, "adapter_config.json"
    folder = source.folder
    if repository is not None and about in repository.files:
        folder = fetch_files(replace(repository, files=(about,)), is_whole=False)
    if folder is None or not (folder / about).is_file():
        return
    name = config.source
    base = json.loads((folder / about).read_text()).get("base_model_name_or_path") or "<its base model>"
    loader = "AutoPeftModelForCausalLM" if is_language else "AutoPeftModelForSequenceClassification"
    raise UserError(
        f"model.source={name} is a peft adapter, not a model: merge it first with "
        f"python -c \"from peft import {loader} as M; M.from_pretrained('{name}').merge_and_unload()"
        f".save_pretrained('merged')\", then set model.source=./merged model.tokenizer={base}"
    )
