"""Repositories of the Hugging Face hub: which commit a name stands for, and its files in the cache.

One short request asks for the commit. Where the hub does not answer it in time, the cache is used. Nothing is read but
from the folder of that commit, every file of which is checked against its hash.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name

from sparsegrad.assets.hub_errors import describe, explain, is_away
from sparsegrad.distributed import is_main
from sparsegrad.errors import UserError
from sparsegrad.hashing import file_sha256

log = logging.getLogger(__name__)
Value = TypeVar("Value")

_QUICK = 5.0  # seconds for the hub to answer where the cache has all files
_PATIENT = 30.0  # and where it has not
_REMEMBERED = 600.0  # seconds for which a hub that did not answer is not asked again, if the cache has all files
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")  # endings of files beside the weights
MODEL_OTHERWISE = "give a folder as model.source=, or use model=minilm, which needs no hub"
_trouble: tuple[float, Exception] | None = None  # when the hub did not answer, and why

# Xet, the hub's storage of large files, has servers of its own. Where a firewall blocks them, its client retries for
# minutes without a word; plain HTTPS goes to the hosts that have just answered. HF_HUB_DISABLE_XET=0 allows it.
if "HF_HUB_DISABLE_XET" not in os.environ:
    constants.HF_HUB_DISABLE_XET = True


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
        partial = _read_cached(self)
        missing = partial.missing() if partial is not None else []
        state = f"incomplete in the cache ({missing[0]} is missing)" if missing else "not in the cache"
        return explain(error, self.name, self.kind, state=state, prefetch=self.prefetch, otherwise=self.otherwise)


def _select_model_files(files: list[str], weights: bool) -> tuple[str, ...]:
    """The files that a model is loaded from; pickles only where there is nothing else."""
    top = [file for file in files if "/" not in file]
    wanted = [file for file in top if file.endswith(_SETTINGS)]
    # `consolidated` files are the same weights once more, in another layout.
    safe = [file for file in top if file.endswith(".safetensors") and not file.startswith("consolidated")]
    pickles = [file for file in top if file.startswith(("pytorch_model", "adapter_model")) and file.endswith(".bin")]
    if not weights:
        return tuple(wanted)
    return tuple(wanted + (safe or pickles)) if safe or pickles else ()


def find_model(name: str, revision: str | None = None, *, weights: bool = True) -> Repository:
    """The state of a model repository; nothing large is downloaded.

    Args:
        name: of the repository.
        revision: branch, tag or commit; None: the default branch.
        weights: whether its weights are wanted, not only configuration and tokenizer.

    Raises:
        UserError: with one cause: not found, gated, token refused, no such revision, hub not reached and not cached.
    """
    return _find(Repository(name, revision=revision, weights=weights))


def fetch_dataset(name: str, patterns: Iterable[str], otherwise: str) -> tuple[Path, tuple[str, ...]]:
    """The folder of a data set's files and the names of those that match `patterns`; what is missing is downloaded.

    Raises:
        UserError: with one cause and its remedy; `otherwise` says how to do without the hub.
    """
    found = _find(Repository(name, "dataset", patterns=tuple(patterns), otherwise=otherwise))
    return fetch_files(found), found.files


def _find(wanted: Repository) -> Repository:
    """The commit and files: from the hub where it answers in time, else from the cache."""
    global _trouble
    cached = _find_cached(wanted)
    if cached is not None and (wanted.revision == cached.commit or constants.HF_HUB_OFFLINE):
        return cached
    if cached is not None and _trouble is not None and time.monotonic() - _trouble[0] < _REMEMBERED:
        return cached
    try:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        found = _within(_PATIENT if cached is None else _QUICK, lambda: _ask(wanted))
    except UserError:
        raise
    except Exception as error:  # of the HTTP client, of its parser, of the operating system
        if cached is None or isinstance(error, RevisionNotFoundError):
            raise wanted.fail(error) from None
        if is_away(error):
            _trouble = (time.monotonic(), error)
        if is_main():
            log.warning("%s: %s is read from the cache", describe(error), wanted.name)
        return cached
    _trouble = None
    return found


def _within(seconds: float, call: Callable[[], Value]) -> Value:
    """The result of `call`, which may last `seconds`.

    The HTTP client's own limit is one per address of the host and per piece of the answer, and none for its name.
    """
    future: Future[Value] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()  # a daemon: the process may end while it hangs
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no answer from {constants.ENDPOINT} within {seconds:g} seconds") from None


def _ask(wanted: Repository) -> Repository:
    """What the hub says; where files are missing, also whether they may be read."""
    api = huggingface_hub.HfApi()
    info: Any = api.repo_info(
        wanted.name, repo_type=wanted.kind, revision=wanted.revision, timeout=_PATIENT, files_metadata=True
    )
    if not _COMMIT.fullmatch(str(info.sha)):
        raise ValueError(f"commit {info.sha!r}")
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or []}
    files = wanted.select(sizes)
    if not files:
        raise _explain_no_files(wanted, list(sizes))
    found = replace(wanted, commit=info.sha, files=files, size=sum(sizes[file] for file in files))
    if missing := found.missing():
        # Everybody may see what a gated repository holds, but not read it.
        url = huggingface_hub.hf_hub_url(found.name, missing[0], repo_type=found.kind, revision=found.commit)
        huggingface_hub.get_hf_file_metadata(url, timeout=_PATIENT)
    return found


def _explain_no_files(wanted: Repository, files: list[str]) -> UserError:
    looked = " and ".join(wanted.patterns) or ("*.safetensors or pytorch_model*.bin" if wanted.weights else "*.json")
    return UserError(
        f"{wanted.name} on the hub has no files {looked} among its {len(files)}: name another repository, or "
        f"{wanted.otherwise}"
    )


def _find_cached(wanted: Repository) -> Repository | None:
    """The state in the cache if it is complete, as far as the cache tells."""
    found = _read_cached(wanted)
    return None if found is None or not found.files or found.missing() else found


def _read_cached(wanted: Repository) -> Repository | None:
    """The state that the cache has of a revision, complete or not."""
    try:
        commit = wanted.revision or constants.DEFAULT_REVISION
        if not _COMMIT.fullmatch(commit):
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


def fetch_files(repository: Repository) -> Path:
    """The folder of a repository's files; what is not in the cache is downloaded, with a bar per file.

    Raises:
        UserError: when a file can be had neither from the hub nor from the cache, cannot be written, or is damaged.
    """
    if missing := repository.missing():
        size = f", {repository.size / 1e6:,.1f} MB" if repository.size else ""
        if is_main():
            log.info("downloading %s: %d files%s", repository.name, len(repository.files), size)
        for file in missing:
            try:
                huggingface_hub.hf_hub_download(
                    repository.name, file, repo_type=repository.kind, revision=repository.commit
                )
            except Exception as error:
                raise repository.fail(error) from None
    if missing := repository.missing():
        raise repository.fail(LocalEntryNotFoundError(f"{missing[0]} was not stored"))
    _check_content(repository)
    _note_commit(repository)
    return repository.folder


def _check_content(repository: Repository) -> None:
    """Every file has the content that its name in the cache stands for."""
    for file in repository.files:
        path = (repository.folder / file).resolve()
        try:
            status = path.stat()
            intact = _is_intact(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise UserError(
                f"{repository.name} cannot be read from the cache ({path}: {error.strerror}): correct the permissions, "
                f"or {repository.otherwise}"
            ) from None
        if not intact:
            raise UserError(
                f"{repository.name} is damaged in the cache ({file} does not have the content that the hub announced): "
                f"delete it with `rm -r {repository.storage}` and run again, or {repository.otherwise}"
            )


@functools.lru_cache(maxsize=4096)
def _is_intact(path: Path, size: int, modified: int) -> bool:
    """Whether a file is what its name says: SHA-256 of a large file, git's SHA-1 of a small one; others pass."""
    if re.fullmatch(r"[0-9a-f]{64}", path.name):
        return file_sha256(path) == path.name
    if not re.fullmatch(r"[0-9a-f]{40}", path.name):  # a cache without links, as on Windows
        return True
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest() == path.name


def _note_commit(repository: Repository) -> None:
    """Note in the cache which commit the revision stands for, so that it is found there without the hub."""
    revision = repository.revision or constants.DEFAULT_REVISION
    reference = repository.storage / "refs" / revision
    if revision == repository.commit:
        return
    try:
        if reference.is_file() and reference.read_text() == repository.commit:
            return
        reference.parent.mkdir(parents=True, exist_ok=True)
        scratch = reference.with_name(f".{reference.name}.{os.getpid()}.tmp")
        scratch.write_text(repository.commit)
        scratch.replace(reference)
    except OSError as error:  # a cache that others maintain
        log.debug("%s is not noted in the cache: %s", repository.commit, error)
