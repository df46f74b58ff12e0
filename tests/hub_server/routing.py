"""Requests, answers and the table of routes."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from .errors import HubError


if TYPE_CHECKING:
    from .server import HubServer


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # path and query as sent: revisions are quoted in it, "refs%2Fpr%2F1"
    headers: Message
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.target).query).items()}

    @cached_property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Answer":
        body = json.dumps(value).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


PARTS = {
    # A repository without a namespace matches too, so that it is answered as one that does not exist.
    "{repo}": r"(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+(?:/[^/]+)?)",
    "{page}": r"(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+(?:/[^/]+?)?)",
    "{revision}": r"(?P<revision>[^/]+)",
    "{name}": r"(?P<name>[^/]+)",
    "{path}": r"(?P<path>.+)",
}
ROUTES: list[tuple[str, re.Pattern[str], str | None, Callable[..., Answer]]] = []


def route(
    method: str, path: str, needs: str | None = None
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """
    The function answers `method` on `path` as `function(hub, request, ...)`. A path with {repo} or {page} gives it
    the argument `repo`, of which the caller has the right `needs`, "read" or "write"; {revision}, {name} and {path}
    give it those, unquoted.
    """
    pattern = path
    for part, regex in PARTS.items():
        pattern = pattern.replace(part, regex)

    def add(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern), needs, function))
        return function

    return add


def dispatch(hub: "HubServer", request: Request) -> Answer:
    """Raises `HubError` for what is refused."""
    method = "GET" if request.method == "HEAD" else request.method
    for route_method, pattern, needs, function in ROUTES:
        match = pattern.fullmatch(request.path) if route_method == method else None
        if match is None:
            continue
        arguments: dict[str, Any] = {key: unquote(value) for key, value in match.groupdict("").items()}
        if needs is not None:
            kind, repo_id = arguments.pop("kind") or "models", arguments.pop("repo_id")
            arguments["repo"] = hub.repository(kind, repo_id, hub.user(request), needs)
        return function(hub, request, **arguments)
    raise HubError(404, f"this server has no {request.method} {request.path}")
