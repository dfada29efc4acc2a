"""The Hugging Face hub: whether it answers, which commit a name stands for, and what an error of its means."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sparsegrad.errors import UserError, first_line

_PROBE_SECONDS = 5.0
_REMEMBERED_SECONDS = 60.0  # for which an answer of the probe is taken for granted
_WANTED = (".json", ".txt", ".model", ".safetensors", ".bin")  # endings of files that a model is loaded from
_last_probe: tuple[float, bool] | None = None


@dataclass(frozen=True)
class Repository:
    """One state of a model repository.

    Attributes:
        name: such as `org/name`.
        commit: the full hash that the revision stands for now.
        files: names of the files that a model is loaded from; empty where only the cache was asked.
    """

    name: str
    commit: str
    files: tuple[str, ...] = ()


def hub_answers() -> bool:
    """Whether the hub answers one short request. The answer is remembered for a minute.

    The hub's client retries for about a minute before it gives up, so everything asks here first. A server error
    (status 500 and above) counts as no answer: the cache is then used at once.
    """
    global _last_probe
    if constants.HF_HUB_OFFLINE:
        return False
    if _last_probe is None or time.monotonic() - _last_probe[0] > _REMEMBERED_SECONDS:
        _last_probe = (time.monotonic(), _probe())
    return _last_probe[1]


def _probe() -> bool:
    try:
        response = get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # no network, no DNS, a proxy that refuses, too slow: in every case the cache is used
        return False
    return bool(response.status_code < 500)


def find_repository(name: str, revision: str | None = None) -> Repository:
    """The state of a model repository: from the hub where it answers, else from the cache.

    Raises:
        UserError: with one cause: not found, gated, token refused, no such revision, server error, not cached.
    """
    if not hub_answers():
        return _cached_repository(name, revision)
    try:
        info = huggingface_hub.model_info(name, revision=revision, timeout=2 * _PROBE_SECONDS)
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and not _is_server_error(error):
            raise explain(error, name) from None
        return _cached_repository(name, revision, error)  # the hub went away meanwhile
    files = [one.rfilename for one in info.siblings or []]
    return Repository(name, str(info.sha), _files_to_load(files))


def _files_to_load(files: list[str]) -> tuple[str, ...]:
    """The files at the top of a repository that a model is loaded from; pickles only where there is nothing else."""
    top = [file for file in files if "/" not in file and file.endswith(_WANTED)]
    safe = any(file.endswith(".safetensors") for file in top)
    return tuple(file for file in top if not (safe and file.endswith(".bin")))


def _cached_repository(name: str, revision: str | None, error: Exception | None = None) -> Repository:
    found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise explain(error or LocalEntryNotFoundError("not in the cache"), name)
    return Repository(name, Path(found).parent.name)


def download(repository: Repository) -> Path:
    """The folder of a repository's files; what is not in the cache is downloaded, with a bar.

    Raises:
        UserError: when a file can be had neither from the hub nor from the cache, or cannot be written.
    """
    only_cached = not repository.files
    try:
        folder = huggingface_hub.snapshot_download(
            repository.name,
            revision=repository.commit,
            allow_patterns=list(repository.files) or None,
            local_files_only=only_cached,
        )
    except Exception as error:
        raise explain(error, repository.name) from None
    return Path(folder)


def explain(error: BaseException, name: str) -> UserError:
    """The error for the user, with its one cause and a remedy for that."""
    cause = _deepest(error)
    text = str(error) + str(cause)
    login = "log in with `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, GatedRepoError) or "gated repo" in text:
        return UserError(
            f"model {name} is gated: ask for access on {constants.ENDPOINT}/{name}, then {login} with that account's "
            "token, or give a folder that holds it as model.source="
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"model {name} has not this revision: set model.revision= to a branch, tag or commit of it")
    if "Invalid user token" in text or "token has expired" in text.lower():
        return UserError(f"the hub refuses the token of this machine as invalid or expired: {login} again, or log out")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"model {name} is not on the hub, or is private: check the name, {login} if it is private, or give a "
            "folder as model.source="
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return UserError(f"model {name} cannot be stored in the cache ({first_line(cause)}): free space or set HF_HOME")
    return UserError(
        f"model {name} is neither cached nor can the hub be reached ({_kind(error, cause)}{first_line(cause)}): "
        f"download it where there is a network with `hf download {name}` (and set HF_HOME to the copied cache), give a "
        "folder as model.source=, or use model=minilm, which needs no hub"
    )


def _kind(error: BaseException, cause: BaseException) -> str:
    """The kind of trouble on the way to the hub, to be put before what the error says."""
    text = f"{type(cause).__name__} {cause}".lower()
    if _is_server_error(error):
        return "server error: "
    if "proxy" in text:
        return "proxy: "
    if "ssl" in text or "certificate" in text:
        return "TLS: "
    return ""


def _is_server_error(error: BaseException) -> bool:
    response: Any = getattr(error, "response", None)
    return response is not None and response.status_code >= 500


def _deepest(error: BaseException) -> BaseException:
    """The first cause in a chain of errors: what a library wrapped says less."""
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        error = cause
    return error
