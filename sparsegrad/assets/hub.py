"""Repositories of the Hugging Face hub: which commit a name stands for, and its files in the cache.

One short request asks for the commit. Where the hub does not answer it in time, the cache is used. Nothing is read but
from the folder of that commit, every file of which is checked against its hash.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionNotFoundError

from sparsegrad.assets.hub_errors import describe, is_away
from sparsegrad.assets.hub_repository import COMMIT, MODEL_OTHERWISE, Repository, find_cached
from sparsegrad.distributed import is_main
from sparsegrad.errors import UserError
from sparsegrad.hashing import file_sha256
from sparsegrad.progress import foreign_bars, track

log = logging.getLogger(__name__)
Value = TypeVar("Value")

_QUICK = 5.0  # seconds for the hub to answer where the cache has all files
_PATIENT = 30.0  # and where it has not
_REMEMBERED = 600.0  # seconds for which a hub that did not answer is not asked again, if the cache has all files
_trouble: tuple[float, Exception] | None = None  # when the hub did not answer, and why

# Xet, the hub's storage of large files, has servers of its own. Where a firewall blocks them, its client retries for
# minutes without a word; plain HTTPS goes to the hosts that have just answered. HF_HUB_DISABLE_XET=0 allows it.
if "HF_HUB_DISABLE_XET" not in os.environ:
    constants.HF_HUB_DISABLE_XET = True


def find_model(
    name: str, revision: str | None = None, *, weights: bool = True, otherwise: str = MODEL_OTHERWISE
) -> Repository:
    """The state of a model repository; nothing large is downloaded.

    Args:
        name: of the repository.
        revision: branch, tag or commit; None: the default branch.
        weights: whether its weights are wanted, not only configuration and tokenizer.
        otherwise: how to do without the hub, for the error.

    Raises:
        UserError: with one cause: not found, gated, token refused, no such revision, hub not reached and not cached.
    """
    return _find(Repository(name, revision=revision, weights=weights, otherwise=otherwise))


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
    cached = find_cached(wanted)
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
    if not COMMIT.fullmatch(str(info.sha)):
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


def fetch_files(repository: Repository, *, is_whole: bool = True) -> Path:
    """The folder of a repository's files; what is not in the cache is downloaded, with a bar per file.

    Args:
        repository: the files.
        is_whole: whether they are all that a run needs. Only then does the cache note their commit: without the hub, a
            run looks for all of its files in the noted one.

    Raises:
        UserError: when a file can be had neither from the hub nor from the cache, cannot be written, or is damaged.
    """
    if missing := repository.missing():
        size = f", {repository.size / 1e6:,.1f} MB" if repository.size else ""
        if is_main():
            log.info("downloading %s: %d files%s", repository.name, len(repository.files), size)
        with foreign_bars():  # the hub's bars know the bytes of a file
            for file in track(missing, f"downloading {repository.name}", unit="files"):
                try:
                    huggingface_hub.hf_hub_download(
                        repository.name, file, repo_type=repository.kind, revision=repository.commit
                    )
                except Exception as error:
                    raise repository.fail(error) from None
    if missing := repository.missing():
        raise repository.fail(LocalEntryNotFoundError(f"{missing[0]} was not stored"))
    _check_content(repository)
    if is_whole:
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
