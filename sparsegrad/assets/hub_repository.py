"""One state of a hub repository: which of its files are wanted, and what the cache on this machine has of them."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from sparsegrad.assets.hub_errors import explain
from sparsegrad.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".codes", ".py")  # endings of files beside the weights
MODEL_OTHERWISE = "give a folder as model.source=, or use model=minilm, which needs no hub"


@dataclass(frozen=True)
class Repository:
    """One state of a repository, and which of its files are wanted.

    Attributes:
        name: such as `org/name`.
        kind: `model` or `dataset`.
        revision: branch, tag or commit that was asked for; None: the default branch.
        patterns: of the wanted files of a data set.
        weights: whether a model's weights are wanted; otherwise only configuration and tokenizer.
        otherwise: how to do without the hub, for error messages.
        commit: the full hash that the revision stands for; empty: not known yet.
        files: names of the wanted files.
        size: bytes of all wanted files; 0: not known.
    """

    name: str
    kind: str = "model"
    revision: str | None = None
    patterns: tuple[str, ...] = ()
    weights: bool = True
    otherwise: str = MODEL_OTHERWISE
    commit: str = ""
    files: tuple[str, ...] = ()
    size: int = 0

    @property
    def storage(self) -> Path:
        """Folder of all its commits in the cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)

    @property
    def folder(self) -> Path:
        """Folder of this commit in the cache."""
        return self.storage / "snapshots" / self.commit

    @property
    def prefetch(self) -> str:
        """The command that downloads it."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download{kind} {self.name}{revision}"

    def missing(self) -> list[str]:
        """The wanted files that the cache lacks."""
        return [file for file in self.files if not (self.folder / file).is_file()]

    def select(self, files: Iterable[str]) -> tuple[str, ...]:
        """The wanted ones of the repository's files; none at all if some kind of them is not among these."""
        files = list(files)
        if self.kind == "model":
            return _select_model_files(files, self.weights)
        found = [fnmatch.filter(files, pattern) for pattern in self.patterns]
        return tuple(sorted({file for group in found for file in group})) if all(found) else ()

    def fail(self, error: BaseException) -> UserError:
        """The error for the user, with its cause and remedy."""
        partial = read_cached(self)
        missing = partial.missing() if partial is not None else []
        state = f"incomplete in the cache ({missing[0]} is missing)" if missing else "not in the cache"
        return explain(error, self.name, self.kind, state=state, prefetch=self.prefetch, otherwise=self.otherwise)


def _select_model_files(files: list[str], weights: bool) -> tuple[str, ...]:
    """The files that a model is loaded from; pickles only where there is nothing else."""
    top = [file for file in files if "/" not in file]
    wanted = [file for file in top if file.endswith(SETTINGS)]
    # `consolidated` files are the same weights once more, in another layout.
    safe = [file for file in top if file.endswith(".safetensors") and not file.startswith("consolidated")]
    pickles = [file for file in top if file.startswith(("pytorch_model", "adapter_model")) and file.endswith(".bin")]
    if not weights:
        return tuple(wanted)
    return tuple(wanted + (safe or pickles)) if safe or pickles else ()


def find_cached(wanted: Repository) -> Repository | None:
    """The state in the cache if it is complete, as far as the cache tells."""
    found = read_cached(wanted)
    return None if found is None or not found.files or found.missing() else found


def read_cached(wanted: Repository) -> Repository | None:
    """The state that the cache has of a revision, complete or not."""
    try:
        commit = wanted.revision or constants.DEFAULT_REVISION
        if not COMMIT.fullmatch(commit):
            commit = (wanted.storage / "refs" / commit).read_text().strip()
        found = replace(wanted, commit=commit)
        return replace(found, files=found.select(_list_cached(found))) if found.folder.is_dir() else None
    except (OSError, ValueError):
        return None


def _list_cached(found: Repository) -> list[str]:
    """The repository's files: all of them where the hub's client has stored the list, else the cached ones."""
    stored = found.storage / "trees" / f"{found.commit}.json"
    if stored.is_file():
        return list(json.loads(stored.read_text())["files"])
    # Links whose target is gone count as files, so that they are found missing.
    files = [path for path in found.folder.rglob("*") if path.is_symlink() or path.is_file()]
    names = {str(path.relative_to(found.folder)) for path in files}
    for path in found.folder.glob("*.index.json"):
        names |= set(json.loads(path.read_text())["weight_map"].values())
    return sorted(names)
