"""Print constraints for what `pip install --dry-run --report FILE` resolved: `python scripts/lock.py FILE`.

`make lock` calls it. A build's own label goes (torch 2.13.0+cpu becomes 2.13.0), since the lock serves every build.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_PER_BUILD = ("cuda-", "nvidia-", "triton")  # only a CUDA build of torch brings them, and that pins them itself


def lock(report: dict[str, Any]) -> list[str]:
    """Lines `name==version` of all packages but the project, in order of their names."""
    packages = [entry["metadata"] for entry in report["install"] if "dir_info" not in entry["download_info"]]
    kept = [package for package in packages if not package["name"].startswith(_PER_BUILD)]
    return [f"{p['name']}=={p['version'].split('+')[0]}" for p in sorted(kept, key=lambda p: str.lower(p["name"]))]


if __name__ == "__main__":
    print("\n".join(lock(json.loads(Path(sys.argv[1]).read_text()))))
