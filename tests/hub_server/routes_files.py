"""Files: listing, upload by LFS and Xet, commit, download."""

import base64
import json
import re
import time
from typing import Any
from urllib.parse import parse_qs

from .errors import HubError
from .lfs import is_ignored, pointer_size, upload_mode
from .repository import Commit, File, Repository, Tree, find, folder_oid, folders
from .routing import Answer, Request, route
from .server import HubServer


def tree_item(hub: HubServer, path: str, file: File | None) -> dict[str, Any]:
    """As listed; a folder has no `File`."""
    if file is None:
        return {"type": "directory", "path": path, "oid": folder_oid(path), "size": 0}
    item: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.sha256 is not None:
        item["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer_size(file)}
        if (entry := hub.xet.find(file.sha256)) is not None:
            item["xetHash"] = entry.xet_hash
    return item


@route("GET", "/api/{repo}/tree/{revision}(?:/{path})?", needs="read")
def tree(hub: HubServer, request: Request, repo: Repository, revision: str, path: str) -> Answer:
    commit = repo.resolve(revision)
    everything: dict[str, File | None] = {**dict.fromkeys(folders(commit.tree)), **commit.tree}
    if path and path not in folders(commit.tree):
        find(commit, path)
        raise HubError(404, f"{path} is not a folder", code="EntryNotFound")
    start = f"{path}/" if path else ""
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    return Answer.of(
        [
            tree_item(hub, entry, file)
            for entry, file in sorted(everything.items())
            if entry.startswith(start) and (recursive or "/" not in entry.removeprefix(start))
        ]
    )


@route("POST", "/api/{repo}/paths-info/{revision}", needs="read")
def paths_info(hub: HubServer, request: Request, repo: Repository, revision: str) -> Answer:
    """Paths that do not exist are left out, as the Hub does. The client sends a form; others send JSON."""
    commit = repo.resolve(revision)
    is_json = request.headers.get("Content-Type", "").startswith("application/json")
    paths = request.json["paths"] if is_json else parse_qs(request.body.decode()).get("paths", [])
    known: dict[str, File | None] = {**dict.fromkeys(folders(commit.tree)), **commit.tree}
    return Answer.of([tree_item(hub, path, known[path]) for path in paths if path in known])


@route("POST", "/api/{repo}/preupload/{revision}", needs="read")
def preupload(hub: HubServer, request: Request, repo: Repository, revision: str) -> Answer:
    hub.require_right_to_commit(repo, request)
    current = repo.resolve(revision).tree
    gitignore = request.json.get("gitIgnore")
    if gitignore is None:
        gitignore = current[".gitignore"].content.decode() if ".gitignore" in current else ""
    return Answer.of(
        {
            "files": [
                {
                    "path": path,
                    "uploadMode": upload_mode(path, file["size"]),
                    "shouldIgnore": is_ignored(path, gitignore),
                    # The client leaves out of its commit the files that have this id already.
                    **({"oid": current[path].etag} if path in current else {}),
                }
                for file in request.json["files"]
                for path in [file["path"]]
            ]
        }
    )


@route("POST", r"/{page}\.git/info/lfs/objects/batch", needs="read")
def lfs_batch(hub: HubServer, request: Request, repo: Repository) -> Answer:
    hub.require_user(request)
    objects = []
    for wanted in request.json["objects"]:
        answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.lfs:
            href = f"{hub.endpoint}/lfs/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(answer)
    return Answer.of({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{name}")
def lfs_put(hub: HubServer, request: Request, name: str) -> Answer:
    """Without a token: on the Hub this is the signed address of a storage service."""
    hub.lfs.put(name, request.body)
    return Answer()


@route("POST", "/lfs/{name}/verify")
def lfs_verify(hub: HubServer, request: Request, name: str) -> Answer:
    if name not in hub.lfs or hub.lfs.file(name).size != request.json["size"]:
        raise HubError(400, f"{name} was not uploaded with this size")
    return Answer.of({})


def xet_access(hub: HubServer) -> Answer:
    expires = int(time.time()) + 3600
    return Answer.of(
        {"accessToken": "xet", "exp": expires, "casUrl": hub.xet.url},
        headers={
            "X-Xet-Cas-Url": hub.xet.url,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(expires),
        },
    )


@route("GET", "/api/{repo}/xet-read-token/{revision}", needs="read")
def xet_read_token(hub: HubServer, request: Request, repo: Repository, revision: str) -> Answer:
    return xet_access(hub)


@route("GET", "/api/{repo}/xet-write-token/{revision}", needs="read")
def xet_write_token(hub: HubServer, request: Request, repo: Repository, revision: str) -> Answer:
    hub.require_right_to_commit(repo, request)
    return xet_access(hub)


def apply(hub: HubServer, commit: Commit, operations: list[dict[str, Any]]) -> Tree:
    """The tree of `commit` after the operations of a new one."""
    files = dict(commit.tree)
    for operation in operations:
        value = operation["value"]
        path = value["path"].rstrip("/")
        match operation["key"]:
            case "file":
                files[path] = File.regular(base64.b64decode(value["content"]))
            case "lfsFile":
                files[path] = hub.lfs.file(value["oid"])
            case "deletedFile":
                find(commit, path)
                files.pop(path, None)
            case "deletedFolder":
                if path not in folders(commit.tree):
                    find(commit, path)
                files = {name: file for name, file in files.items() if not name.startswith(f"{path}/")}
            case key:
                raise HubError(400, f"this server does not know the operation {key}")
    return files


@route("POST", "/api/{repo}/commit/{revision}", needs="read")
def commit(hub: HubServer, request: Request, repo: Repository, revision: str) -> Answer:
    hub.require_right_to_commit(repo, request)
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    title, parent = header["value"]["summary"], header["value"].get("parentCommit")
    opens_pull_request = bool(request.query.get("create_pr"))
    ref = repo.ref(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(404, f"Not a branch: {revision}", code="RevisionNotFound")
    base = repo.resolve(parent if parent is not None and opens_pull_request else ref)
    if parent is not None and not base.oid.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")

    files = apply(hub, base, operations)
    answer: dict[str, Any] = {"success": True, "hookOutput": ""}
    author = hub.require_user(request)
    if opens_pull_request:
        pull_request = repo.open_pull_request(title, author, start=base.oid)
        ref = pull_request.ref
        answer["pullRequestUrl"] = f"{hub.endpoint}/{repo.path}/discussions/{pull_request.num}"
    made = repo.commit(ref, files, title, author, header["value"].get("description") or "")
    return Answer.of({**answer, "commitOid": made.oid, "commitUrl": f"{hub.endpoint}/{repo.path}/commit/{made.oid}"})


@route("GET", "/{page}/resolve/{revision}/{path}", needs="read")
def resolve(hub: HubServer, request: Request, repo: Repository, revision: str, path: str) -> Answer:
    current = repo.resolve(revision)
    file = find(current, path)
    headers = {
        "ETag": f'"{file.etag}"',
        "X-Repo-Commit": current.oid,
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Content-Length": str(file.size),
    }
    if file.sha256 is not None:
        headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        if (entry := hub.xet.find(file.sha256)) is not None:
            token_url = f"{hub.endpoint}/api/{repo.kind}/{repo.id}/xet-read-token/{current.oid}"
            headers |= {"X-Xet-Hash": entry.xet_hash, "X-Xet-Refresh-Route": token_url}
    if request.method == "HEAD":
        return Answer(headers=headers)  # the true length, without reading the content
    return part(Answer(200, hub.lfs.read(file), headers), request.headers.get("Range", ""))


def part(answer: Answer, wanted: str) -> Answer:
    """The bytes "bytes=first-last", "bytes=first-" or "bytes=-count" of a whole answer."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if match is None or wanted == "bytes=-":
        return answer
    size = len(answer.body)
    first = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first > last:
        raise HubError(416, f"not in the {size} bytes: {wanted}", headers={"Content-Range": f"bytes */{size}"})
    body = answer.body[first : last + 1]
    ranged = {"Content-Length": str(len(body)), "Content-Range": f"bytes {first}-{last}/{size}"}
    return Answer(206, body, {**answer.headers, **ranged})
