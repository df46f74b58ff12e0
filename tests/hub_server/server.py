"""`HubServer`: what the server knows, its life as a thread, its HTTP."""

import re
import socket
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .errors import HubError
from .faults import Fault, Faults
from .lfs import LfsStore
from .repository import Commit, Repository
from .routing import Answer, Request, dispatch
from .xet import XetStore


PIECE = 2**16  # bytes read from a socket at once


class HubServer:
    """
    A Hub on 127.0.0.1. `directory` holds its Xet storage; all else is in memory. As a context manager it serves
    from a thread. `repos` has "user/name" for models, "datasets/user/name" and "spaces/user/name" for the others.
    """

    def __init__(self, directory: Path, port: int = 0):
        self.directory = directory
        self.xet = XetStore(directory / "xet_storage")
        self.lfs = LfsStore(self.xet)
        self.repos: dict[str, Repository] = {}
        self.users: dict[str, str] = {}  # token -> name
        self.name = "tester"
        self.token = self.add_user(self.name)
        self.requests: list[str] = []  # "METHOD /path?query", in order of arrival
        self.faults = Faults()
        self.lock = threading.Lock()  # one request at a time changes or reads the repositories
        self._http = _Listener(("127.0.0.1", port), self)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.heal()
        self._http.shutdown()
        self._http.server_close()
        self._http.close_connections()
        self._thread.join()

    # What tests ask

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Without .gitattributes, which every repository begins with."""
        with self.lock:
            tree = self.repos[repo_id].resolve(revision).tree
            return {path: self.lfs.read(file) for path, file in tree.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        return list(self.repos[repo_id].log(revision))

    def add_user(self, name: str) -> str:
        """A further user; returns the token."""
        token = f"hf_{name}"
        self.users[token] = name
        return token

    # Failures that tests switch on

    def fail_next(self, n: int = 1, status: int = 503, match: str = "", code: str | None = None) -> None:
        """
        The next `n` requests in whose "METHOD /path?query" the regex `match` is found are answered `status`, and
        with the error code `code`.
        """
        self.faults.add(Fault(re.compile(match), n, status=status, code=code))

    def cut_connection(self, match: str = "", after_bytes: int = 0, n: int = 1) -> None:
        """
        The next `n` matching requests lose their connection after `after_bytes` of what is uploaded or, for a
        request without a body, of what is downloaded. Nothing of a cut upload is kept.
        """
        self.faults.add(Fault(re.compile(match), n, after_bytes=after_bytes))

    def hold(self, match: str = "", n: int = 1000) -> None:
        """The next `n` matching requests are answered no earlier than `heal`."""
        self.faults.add(Fault(re.compile(match), n, holds=True))

    def heal(self) -> None:
        self.faults.clear()

    # Rights

    def user(self, request: Request) -> str | None:
        """The caller's name, none without a token."""
        authorization = request.headers.get("Authorization")
        if authorization is None:
            return None
        name = self.users.get(authorization.removeprefix("Bearer "))
        if name is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return name

    def require_user(self, request: Request) -> str:
        name = self.user(request)
        if name is None:
            raise HubError(401, "Invalid username or password.")
        return name

    def repository(self, kind: str, repo_id: str, user: str | None, needs: str) -> Repository:
        """Users write to their own repositories only; a private one does not exist for others."""
        repo = self.repos.get(repo_id if kind == "models" else f"{kind}/{repo_id}")
        if repo is None or (repo.private and user != repo.owner):
            raise HubError(401 if user is None else 404, "Repository not found", code="RepoNotFound")
        if needs == "write" and user != repo.owner:
            raise HubError(401 if user is None else 403, "You don't have the rights to write to this repository")
        return repo

    def require_right_to_commit(self, repo: Repository, request: Request) -> None:
        """Whoever may read a repository may open a pull request."""
        user = self.require_user(request)
        self.repository(repo.kind, repo.id, user, "read" if request.query.get("create_pr") else "write")


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: HubServer):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def close_connections(self) -> None:
        """Clients keep connections open; after the end of the server nothing must be answered on them."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client has closed it

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is not an error of the server; others are answered by the handler."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; else the second waits for an acknowledgement
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `HubServer.requests` has them."""

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives, of known length or chunked."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while (size := int(self.rfile.readline().split(b";")[0], 16)) > 0:
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            yield piece

    def answer(self) -> None:
        hub = self.server.hub
        line = f"{self.command} {self.path}"
        hub.requests.append(line)
        fault = hub.faults.hit(line)
        if fault is not None and fault.holds:
            fault.healed.wait()
            fault = None
        cut_at = fault.after_bytes if fault is not None and fault.status is None else None
        self.close_connection = self.close_connection or cut_at is not None
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if cut_at is not None and len(body) >= cut_at:
                break
        if cut_at is not None and body:
            return
        if fault is not None and fault.status is not None:
            error = HubError(fault.status, "failure switched on by the test", fault.code)
            answer = Answer.of({"error": str(error)}, error.status, error.headers)
        else:
            answer = self.ask(Request(self.command, self.path, self.headers, bytes(body)))
        self.send(answer, answer.body[:cut_at])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def ask(self, request: Request) -> Answer:
        try:
            with self.server.hub.lock:
                return dispatch(self.server.hub, request)
        except HubError as error:
            return Answer.of({"error": str(error)}, error.status, error.headers)
        except Exception as error:
            traceback.print_exc()
            # Not 500: that the client would try again, and the test would only be slow.
            return Answer.of({"error": f"a bug of the test server: {error!r}"}, status=501)

    def send(self, answer: Answer, body: bytes) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
