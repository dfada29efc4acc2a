"""The uploading half of the hub on loopback: what a client sends to create a repository and a commit.

Large files go to the storage by their SHA-256 before the commit that names them; small ones are in the commit itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from hub_server import Hub

Answer = tuple[int, dict[str, str], bytes]


def accept(hub: Hub, address: str, content: bytes, token: str | None) -> Answer:
    """The answer to a POST or PUT."""
    path = urlsplit(address).path
    if match := re.fullmatch(r"/upload/([0-9a-f]{64})", path):  # the address is signed: no token
        return _store(hub, match[1], content)
    if path == "/api/validate-yaml":
        return _reply(errors=[], warnings=[])
    if token not in hub.tokens:
        return 401, {"X-Error-Message": "Invalid username or password."}, b"{}"
    if path == "/api/repos/create":
        return _create(hub, json.loads(content))
    match = re.fullmatch(
        r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?/(preupload/main|info/lfs/objects/batch|commit/main)", path
    )
    if match is None or f"models/{match[1]}" not in hub.repos:
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    if match[2].startswith("preupload"):
        return _choose_ways(json.loads(content))
    if match[2].startswith("info"):
        return _give_addresses(hub, json.loads(content))
    return _commit(hub, match[1], [json.loads(line) for line in content.splitlines()])


def _reply(status: int = 200, **content: Any) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _create(hub: Hub, wanted: dict[str, Any]) -> Answer:
    from hub_server import Repo

    name = f"{wanted['organization']}/{wanted['name']}"
    if f"models/{name}" in hub.repos:
        return _reply(409, error="You already created this model repo", url=f"{hub.url}/{name}")
    hub.repos[f"models/{name}"] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    hub.repos[f"models/{name}"].push({})
    return _reply(url=f"{hub.url}/{name}", name=name, id="0")


def _choose_ways(wanted: dict[str, Any]) -> Answer:
    from hub_server import LARGE

    files = [
        {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
        for one in wanted["files"]
    ]
    return _reply(files=files)


def _give_addresses(hub: Hub, wanted: dict[str, Any]) -> Answer:
    objects = [{**one, "actions": {"upload": {"href": f"{hub.url}/upload/{one['oid']}"}}} for one in wanted["objects"]]
    return _reply(transfer="basic", objects=objects)


def _store(hub: Hub, sha256: str, content: bytes) -> Answer:
    if hashlib.sha256(content).hexdigest() != sha256:
        return _reply(400, error="the content has another SHA-256")
    hub.stored[sha256] = content
    return _reply()


def _commit(hub: Hub, name: str, lines: list[dict[str, Any]]) -> Answer:
    repo = hub.repos[f"models/{name}"]
    files = dict(repo.commits[repo.head])
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.stored[value["oid"]]
    repo.message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
    commit = repo.push(files)
    return _reply(commitOid=commit, commitUrl=f"{hub.url}/{name}/commit/{commit}", hookOutput="")
