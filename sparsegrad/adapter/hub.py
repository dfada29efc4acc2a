"""Adapters on the Hugging Face hub: download one by the name of its repository, upload the folder of one.

`huggingface_hub` is imported only when a name or an upload needs it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sparsegrad.adapter import lora_files
from sparsegrad.adapter.format import FACTS, TENSORS, read_adapter, tensors_path
from sparsegrad.arguments import explained, show
from sparsegrad.errors import UserError, first_line
from sparsegrad.files import unwritable
from sparsegrad.progress import foreign_bars, has_terminal, is_quiet, job

_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")  # org/name, or the name alone of a few old models
_CARD = "README.md"
_INSTALL = "install huggingface_hub (`pip install huggingface_hub`)"
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_PATIENT = 30.0  # seconds for the hub to answer
_LOGIN = "log in with `hf auth login` or give token="


def find_folder(source: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of an adapter's files, downloaded into the hub's cache if `source` names a repository.

    Raises:
        UserError: for a repository that is unknown, gated or no adapter; a hub that cannot be reached, unless the
            cache has the files; or a `revision` of a folder.
    """
    folder = Path(source)
    if "/" not in str(source) or not is_hub_name(source):
        if revision is not None:
            raise UserError(
                f"revision={revision} is for repositories of the hub, but {source} is a folder: leave it out"
            )
        return folder
    hub = _import_hub(f"there is no folder {source} here; to look for it on the hub, {_INSTALL}")
    try:
        patterns = [FACTS, TENSORS, _CARD]
        with _show_job(f"downloading {source}"):
            found = Path(hub.snapshot_download(source, revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:  # of the HTTP client, of its parser, of the operating system
        label = f"{source} (no folder here)"
        raise _explain(error, label, "or name a folder of save_adapter") from None
    if not (found / FACTS).is_file():
        raise UserError(
            f"{source} on the hub has no {FACTS}: name a repository with an adapter of save_adapter; load a LoRA "
            "adapter with peft.PeftModel.from_pretrained"
        )
    return found


def is_hub_name(source: str | Path) -> bool:
    """Whether `source` can be on the hub alone: there is no such folder, and it looks like a name there."""
    return isinstance(source, str) and _NAME.fullmatch(source) is not None and not Path(source).exists()


def must_use_cache(name: str, label: str, otherwise: str) -> bool:
    """Ask the hub once whether it has a model, before `from_pretrained` asks several times for each of its files.

    Args:
        name: the model's name on the hub.
        label: what errors call it.
        otherwise: how to do without the hub.

    Returns:
        Whether the hub cannot be used now, but the cache has the model.

    Raises:
        UserError: for a model that is neither on the hub nor in the cache, or a hub that cannot be reached.
    """
    hub = _import_hub(f"there is no folder {name} here; to look for it on the hub, {_INSTALL}")
    try:
        hub.HfApi().model_info(name, timeout=_PATIENT)
    except Exception as error:  # see `find_folder`
        # The file that every model of transformers has; None or a marker of its absence if it is not in the cache.
        with suppress(ValueError):  # the name is no name of the hub
            if isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
                return True
        raise _explain(error, label, otherwise) from None
    return False


@explained()
def push_to_hub(
    folder: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Upload an adapter to a model repository of the Hugging Face hub, in one commit.

    Its files and its model card are uploaded, and nothing else of the folder. The files are checked first, so that a
    damaged adapter is not published: those of `save_adapter` by their sha256, those of a LoRA adapter for being
    complete. A save of a LoRA adapter that was killed is completed or undone before. Needs the package
    `huggingface_hub`.

    Args:
        folder: a folder of `save_adapter` or `save_lora`, what these functions returned, or a loaded `Adapter`.
        repo_id: the repository, `org/name`; created if needed.
        private: whether a new repository is private; None uses the account's or organization's default.
        token: access token with write permission; None uses the one that `hf auth login` stored.
        commit_message: message of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: for a folder without a valid adapter; a name, token or permission that the hub refuses; or a hub that
            cannot be reached.
    """
    folder = getattr(folder, "folder", folder)
    _check_upload(folder, repo_id)
    files = _find_files(Path(folder))
    hub = _import_hub(f"to upload an adapter, {_INSTALL}")
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    try:
        api = hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with _show_job(f"uploading {repo_id}"):
            return str(api.create_commit(repo_id, operations, commit_message=commit_message).commit_url)
    except Exception as error:  # see `find_folder`
        if isinstance(error, hub.errors.OfflineModeIsEnabled):
            raise UserError(f"the hub is switched off: unset HF_HUB_OFFLINE to upload {repo_id}") from None
        raise _explain(error, repo_id, "with a token that may write there") from None


def _check_upload(folder: Any, repo_id: Any) -> None:
    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"folder is {show(folder)}, not an adapter or its folder: save it first, then give its folder")
    if not isinstance(repo_id, str):
        raise UserError(f"repo_id is {show(repo_id)}, not a name: give the repository as org/name")
    if not Path(folder).exists() and Path(repo_id).is_dir():
        raise UserError(
            f"folder={folder} is no folder, but repo_id={repo_id} is one: call push_to_hub(folder, repo_id)"
        )


def _find_files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> path, of the adapter in `folder`, SparseGrad's or LoRA's."""
    if not (folder / FACTS).is_file():
        lora_files.settle_lora(folder)
    if (folder / lora_files.CONFIG).is_file() and not (folder / FACTS).is_file():
        lora_files.check_lora(folder)
        files = {name: folder / name for name in (lora_files.CONFIG, lora_files.TENSORS, _CARD)}
    else:
        facts, _, _ = read_adapter(folder)
        # A save that was interrupted has left the tensors under another name.
        files = {FACTS: folder / FACTS, TENSORS: tensors_path(folder, facts["sha256"]), _CARD: folder / _CARD}
    return {name: path for name, path in files.items() if path.is_file() or name != _CARD}


def _import_hub(remedy: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(remedy) from None
    return huggingface_hub


@contextmanager
def _show_job(name: str) -> Iterator[None]:
    """Show a transfer: in a terminal by the hub's own bars, which know its bytes, elsewhere by lines of ours."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    has_bars = not are_progress_bars_disabled()
    hides_bars = has_bars and (is_quiet() or not has_terminal())
    if hides_bars:
        disable_progress_bars()
    try:
        with foreign_bars() if has_bars and not hides_bars else nullcontext(), job(name):
            yield
    finally:
        if hides_bars:
            enable_progress_bars()


def _explain(error: Exception, name: str, otherwise: str) -> UserError:
    """The error for the user: what the hub refuses, or that it cannot be reached."""
    from huggingface_hub import errors

    for cause in (error, error.__cause__):
        if isinstance(cause, OSError) and cause.errno in _NOT_WRITTEN:
            return unwritable(Path(cause.filename or "the hub's cache"), cause)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in (error, error.__cause__)):
        return UserError(f"{name} is not in the cache, and the hub is switched off: unset HF_HUB_OFFLINE, {otherwise}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{name} is not a name on the hub: give org/name, {otherwise}")
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{name} is gated: ask for access on its page, then {_LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name} has no such revision: give revision= as a branch, tag or commit of it")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return UserError(
            f"{name} is not on the hub, or this account may not use it: check the name, {_LOGIN}, {otherwise}"
        )
    reason = first_line(error.__cause__ or error)
    return UserError(
        f"{name}: the hub cannot be reached or refuses the request ({reason}): try again later, {otherwise}"
    )
