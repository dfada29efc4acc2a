"""Print constraints for the packages in a report of pip (`--dry-run --report FILE`): `python scripts/lock.py FILE`.

`make lock` calls it. Labels of builds are removed (torch 2.13.0+cpu becomes 2.13.0): the lock is for all builds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_PER_BUILD = ("cuda-", "nvidia-", "triton")  # dependencies of CUDA builds of torch, which pin them


def lock(report: dict[str, Any]) -> list[str]:
    """Lines `name==version` for all packages except the project, sorted by name."""
    packages = [entry["metadata"] for entry in report["install"] if "dir_info" not in entry["download_info"]]
    kept = [package for package in packages if not package["name"].startswith(_PER_BUILD)]
    return [f"{p['name']}=={p['version'].split('+')[0]}" for p in sorted(kept, key=lambda p: str.lower(p["name"]))]


if __name__ == "__main__":
    print("\n".join(lock(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
