"""
The Xet storage of the server. Its clients are answered with a `local://` address, so that hf_xet itself does the
chunking and keeps chunks and shards in a directory. A commit names a file only by its sha256; the shards tell
which Xet hash this is.
"""

import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


ROW = 48  # every header and row of a shard has this size
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30  # flags of a file: a second row per segment; a row with the sha256
LAST_FILE = b"\xff" * 32

DOWNLOAD = """
import sys
from hf_xet import XetFileInfo, XetSession

url, xet_hash, size, target = sys.argv[1:]
with XetSession().new_file_download_group(endpoint=url) as group:
    group.start_download_file(XetFileInfo(xet_hash, int(size)), target)
"""


@dataclass(frozen=True)
class XetEntry:
    xet_hash: str
    size: int  # bytes


def hash_text(raw: bytes) -> str:
    """Xet prints its hashes as four little-endian integers."""
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", raw))


def read_shard(shard: bytes) -> dict[str, XetEntry]:
    """sha256 -> Xet file, for the files that a shard describes."""
    entries, position = {}, ROW
    while shard[position : position + 32] != LAST_FILE:
        file_hash, flags, n_segments = struct.unpack_from("<32sII", shard, position)
        position += ROW
        # A segment: the hash of its xorb, flags, its bytes, its first and last chunk.
        segments = [struct.unpack_from("<32sIIII", shard, position + i * ROW) for i in range(n_segments)]
        position += n_segments * ROW * (2 if flags & HAS_VERIFICATION else 1)
        if flags & HAS_METADATA:
            sha256 = hash_text(shard[position : position + 32])
            entries[sha256] = XetEntry(hash_text(file_hash), sum(segment[2] for segment in segments))
            position += ROW
    return entries


class XetStore:
    def __init__(self, directory: Path):
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.url = f"local://{self.directory}"
        self._entries: dict[str, XetEntry] = {}
        self._read: set[Path] = set()

    def find(self, sha256: str) -> XetEntry | None:
        for path in set(self.directory.glob("xet/xorbs/shards/*.mdb")) - self._read:
            self._entries.update(read_shard(path.read_bytes()))
            self._read.add(path)
        return self._entries.get(sha256)

    def read(self, sha256: str) -> bytes:
        """Rebuilds the file, for clients without Xet and for the tests."""
        entry = self._entries[sha256]
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            target = Path(folder) / "file"
            # In a process of its own: hf_xet starts threads and writes logs below HF_HOME, neither wanted in a test.
            command = [sys.executable, "-c", DOWNLOAD, self.url, entry.xet_hash, str(entry.size), str(target)]
            subprocess.run(command, check=True, env={**os.environ, "HF_HOME": folder})
            return target.read_bytes()
