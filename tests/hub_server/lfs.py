"""Large files: which files are large, and where their content lies."""

import hashlib
from fnmatch import fnmatch

from .errors import HubError
from .repository import File, git_sha1
from .xet import XetStore


# As in the .gitattributes that the Hub gives to a new repository (those that training writes), and its 10 MiB limit.
LFS_PATTERNS = (
    *("*.arrow", "*.bin", "*.gz", "*.model", "*.npy", "*.npz", "*.onnx", "*.parquet", "*.pkl", "*.pt", "*.pth"),
    *("*.safetensors", "*.tar", "*.zip", "*tfevents*"),
)
LFS_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


def upload_mode(path: str, size: int) -> str:
    name = path.rsplit("/", 1)[-1]
    large = size > LFS_SIZE or any(fnmatch(name, pattern) for pattern in LFS_PATTERNS)
    return "lfs" if large else "regular"


def is_ignored(path: str, gitignore: str) -> bool:
    """The part of .gitignore that projects use: names, globs and folders. No negation."""
    patterns = [line.strip().strip("/") for line in gitignore.splitlines() if line.strip() and line[0] != "#"]
    parts = path.split("/")
    candidates = [*parts, *("/".join(parts[:depth]) for depth in range(2, len(parts) + 1))]
    return any(fnmatch(candidate, pattern) for pattern in patterns for candidate in candidates)


def pointer(sha256: str, size: int) -> bytes:
    """What git stores in the place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def pointer_size(file: File) -> int:
    return len(pointer(file.etag, file.size))


class LfsStore:
    """Contents by sha256: those put by the LFS protocol in memory, those uploaded by Xet in `xet`."""

    def __init__(self, xet: XetStore):
        self.xet = xet
        self.uploads: dict[str, bytes] = {}

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self.uploads or self.xet.find(sha256) is not None

    def put(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, f"the content put is not that of {sha256}")
        self.uploads[sha256] = content

    def file(self, sha256: str) -> File:
        """The tree entry of a stored content."""
        if sha256 in self.uploads:
            size = len(self.uploads[sha256])
        elif (entry := self.xet.find(sha256)) is not None:
            size = entry.size
        else:
            raise HubError(400, f"commit of {sha256}, which was not uploaded")
        return File(git_sha1(pointer(sha256, size)), size, sha256=sha256)

    def read(self, file: File) -> bytes:
        if file.sha256 is None:
            return file.content
        if file.sha256 in self.uploads:
            return self.uploads[file.sha256]
        return self.xet.read(file.sha256)
