"""Accounts, repositories, refs, pull requests."""

from .cards import metadata, problems
from .errors import HubError
from .lfs import GITATTRIBUTES, pointer_size
from .repository import Commit, File, Repository
from .routing import Answer, Request, route
from .server import HubServer


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Answer:
    name = hub.require_user(request)
    token = {"displayName": "tests", "role": "write"}
    auth = {"type": "access_token", "accessToken": token}
    return Answer.of({"type": "user", "name": name, "fullname": name, "orgs": [], "isPro": False, "auth": auth})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Answer:
    errors = [{"message": problem} for problem in problems(request.json["content"])]
    return Answer.of({"errors": errors, "warnings": []}, status=400 if errors else 200)


def named_repo(hub: HubServer, request: Request) -> tuple[str, str]:
    """Kind and id in the body of create and delete; without an organization it is the caller's."""
    user = hub.require_user(request)
    body = request.json
    return f"{body.get('type') or 'model'}s", f"{body.get('organization') or user}/{body['name']}"


@route("POST", "/api/repos/create")
def create(hub: HubServer, request: Request) -> Answer:
    kind, repo_id = named_repo(hub, request)
    if repo_id.split("/")[0] != hub.user(request):
        raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under this namespace")
    private = request.json.get("private") is True or request.json.get("visibility") == "private"
    repo = Repository(kind, repo_id, private, {".gitattributes": File.regular(GITATTRIBUTES)})
    answer = {"url": f"{hub.endpoint}/{repo.path}", "name": repo_id}
    if repo.path in hub.repos:
        # With exist_ok the client reads the url of this refusal.
        return Answer.of({**answer, "error": f"You already created this {kind[:-1]} repo: {repo_id}"}, status=409)
    hub.repos[repo.path] = repo
    return Answer.of(answer)


@route("DELETE", "/api/repos/delete")
def delete(hub: HubServer, request: Request) -> Answer:
    kind, repo_id = named_repo(hub, request)
    repo = hub.repository(kind, repo_id, hub.user(request), "write")
    del hub.repos[repo.path]
    return Answer.of({})


@route("PUT", "/api/{repo}/settings", needs="write")
def settings(hub: HubServer, request: Request, repo: Repository) -> Answer:
    repo.private = request.json.get("visibility", "private" if repo.private else "public") == "private"
    return Answer.of({})


def sibling(path: str, file: File, blobs: bool) -> dict:
    item: dict = {"rfilename": path}
    if blobs:
        item |= {"size": file.size, "blobId": file.oid}
        if file.sha256 is not None:
            item["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": pointer_size(file)}
    return item


def card_data(commit: Commit) -> dict:
    """A card that cannot be read does not make its repository unreadable."""
    readme = commit.tree.get("README.md")
    try:
        return metadata(readme.content.decode()) if readme is not None else {}
    except ValueError:
        return {}


@route("GET", "/api/{repo}(?:/revision/{revision})?", needs="read")
def info(hub: HubServer, request: Request, repo: Repository, revision: str) -> Answer:
    commit = repo.resolve(revision or "main")
    card = card_data(commit)
    blobs = request.query.get("blobs") in ("true", "1", "True")
    return Answer.of(
        {
            "id": repo.id,
            "author": repo.owner,
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "siblings": [sibling(path, file, blobs) for path, file in sorted(commit.tree.items())],
        }
    )


@route("GET", "/api/{repo}/refs", needs="read")
def refs(hub: HubServer, request: Request, repo: Repository) -> Answer:
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/", "pullRequests": "refs/pr/"}
    return Answer.of(
        {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
    )


@route("GET", "/api/{repo}/commits/{revision}", needs="read")
def commits(hub: HubServer, request: Request, repo: Repository, revision: str) -> Answer:
    return Answer.of(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in repo.log(revision)
        ]
    )


def add_ref(repo: Repository, ref: str, start: str) -> Answer:
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.resolve(start).oid
    return Answer.of({})


def delete_ref(repo: Repository, ref: str) -> Answer:
    if ref == "refs/heads/main":
        raise HubError(403, "Cannot delete the default branch")
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, f"Reference not found: {ref}", code="RevisionNotFound")
    return Answer.of({})


@route("POST", "/api/{repo}/branch/{name}", needs="write")
def create_branch(hub: HubServer, request: Request, repo: Repository, name: str) -> Answer:
    return add_ref(repo, f"refs/heads/{name}", request.json.get("startingPoint", "main"))


@route("DELETE", "/api/{repo}/branch/{name}", needs="write")
def delete_branch(hub: HubServer, request: Request, repo: Repository, name: str) -> Answer:
    return delete_ref(repo, f"refs/heads/{name}")


@route("POST", "/api/{repo}/tag/{revision}", needs="write")
def create_tag(hub: HubServer, request: Request, repo: Repository, revision: str) -> Answer:
    return add_ref(repo, f"refs/tags/{request.json['tag']}", revision)


@route("DELETE", "/api/{repo}/tag/{name}", needs="write")
def delete_tag(hub: HubServer, request: Request, repo: Repository, name: str) -> Answer:
    return delete_ref(repo, f"refs/tags/{name}")


@route("POST", "/api/{repo}/discussions", needs="read")
def open_discussion(hub: HubServer, request: Request, repo: Repository) -> Answer:
    if not request.json.get("pullRequest"):
        raise HubError(501, "this server has pull requests only, no discussions")
    pull_request = repo.open_pull_request(request.json["title"], hub.require_user(request), start="main")
    return Answer.of({"num": pull_request.num, "pullRequest": True})


@route("GET", r"/api/{repo}/discussions/{name}", needs="read")
def discussion(hub: HubServer, request: Request, repo: Repository, name: str) -> Answer:
    found = next((pull for pull in repo.pull_requests if str(pull.num) == name), None)
    if found is None:
        raise HubError(404, f"Discussion not found: {name}")
    return Answer.of(
        {
            "num": found.num,
            "title": found.title,
            "author": {"name": found.author},
            "createdAt": found.date,
            "status": "draft",
            "repo": {"name": repo.id, "type": repo.kind[:-1]},
            "isPullRequest": True,
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
        }
    )
