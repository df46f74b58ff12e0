"""Repositories in memory: commits hold whole trees, refs name commits."""

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .errors import HubError


Tree = dict[str, "File"]  # path -> file


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_sha1(content: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class File:
    """A regular file carries its content; a large one only its sha256, its content lies in the `LfsStore`."""

    oid: str  # git id of the blob; of the pointer for a large file
    size: int  # bytes of the content
    content: bytes = b""
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> "File":
        return cls(git_sha1(content), len(content), content)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    tree: Tree
    date: str = field(default_factory=now)


@dataclass(frozen=True)
class PullRequest:
    num: int
    title: str
    author: str
    date: str = field(default_factory=now)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


class Repository:
    """One repository; `kind` is "models", "datasets" or "spaces"."""

    def __init__(self, kind: str, repo_id: str, private: bool, tree: Tree):
        self.kind = kind
        self.id = repo_id
        self.private = private
        self.created = now()
        self.all_commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}  # "refs/heads/main", "refs/tags/v1", "refs/pr/1" -> commit
        self.pull_requests: list[PullRequest] = []
        self.commit("refs/heads/main", tree, title="initial commit", author=self.owner)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def path(self) -> str:
        """The path of its page, which is also its key in `HubServer.repos`: models have no prefix."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def commit(self, ref: str, tree: Tree, title: str, author: str, message: str = "") -> Commit:
        # Random and never used again: clients cache trees by commit id, in caches that outlive this server.
        commit = Commit(secrets.token_hex(20), self.refs.get(ref), title, message, author, tree)
        self.all_commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, a tag or a pull request, if `revision` is one."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request or a commit id (7 characters are enough)."""
        if (ref := self.ref(revision)) is not None:
            return self.all_commits[self.refs[ref]]
        found = [oid for oid in self.all_commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.all_commits[found[0]]

    def log(self, revision: str) -> Iterator[Commit]:
        """Newest first."""
        oid: str | None = self.resolve(revision).oid
        while oid is not None:
            commit = self.all_commits[oid]
            yield commit
            oid = commit.parent

    def open_pull_request(self, title: str, author: str, start: str) -> PullRequest:
        pull_request = PullRequest(len(self.pull_requests) + 1, title, author)
        self.pull_requests.append(pull_request)
        self.refs[pull_request.ref] = self.resolve(start).oid
        return pull_request


def folders(tree: Tree) -> set[str]:
    """Every folder of the tree; git knows folders only by their files."""
    parts = [path.split("/") for path in tree]
    return {"/".join(names[:depth]) for names in parts for depth in range(1, len(names))}


def folder_oid(path: str) -> str:
    """Any id that is stable for a path serves: no client opens a folder by its id."""
    return git_sha1(path.encode(), kind="tree")


def find(commit: Commit, path: str) -> File:
    if path not in commit.tree:
        # The commit lets the client remember that this revision lacks the file.
        raise HubError(404, f"{path} not found", code="EntryNotFound", headers={"X-Repo-Commit": commit.oid})
    return commit.tree[path]
