"""A bounded folder on the local disk that keeps rows of a remote cache: what was used longest ago goes first.

Any number of processes share a folder. One file is one row; it is written under another name and renamed, and it ends in
its label and a checksum, so that whatever happens to the folder, a row is either right or read from the remote cache again.
"""

import fcntl
import os
import shutil
import struct
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from cache.shard import Bytes

_END = struct.Struct("<QI")
_COUNTER = struct.Struct("<q")
_COUNTER_NAME = "bytes.count"
# after an eviction so much of the bound is in use: the folder is listed once for many rows that are added
_KEEP = 0.9
_STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class DiskCache:
    """Rows on the local disk.

    Attributes:
        folder: created when the first row is kept.
        limit: bytes that the rows may take together.
    """

    folder: Path
    limit: int

    def get(self, name: str, label: int, nbytes: int) -> Bytes | None:
        """A row's bytes (nbytes,), or None if they are not here."""
        path = self.folder / name
        try:
            content = np.fromfile(path, np.uint8)
            os.utime(path)
        except OSError:
            return None
        if content.size != nbytes + _END.size:
            return None
        end = _END.pack(label, _checksum(content[:nbytes]))
        return content[:nbytes] if content[nbytes:].tobytes() == end else None

    def put(self, name: str, label: int, data: Bytes) -> None:
        """Keep a row. A disk that is full or refuses is no error: the row is then not kept."""
        size = data.size + _END.size
        if size > self.limit:
            return
        path = self.folder / name
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._reserve(size)
            with temporary.open("xb") as file:
                file.write(data.data)
                file.write(_END.pack(label, _checksum(data)))
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """Bytes that rows take now, counted file by file."""
        return sum(size for _, size, _ in self._files())

    def clear(self) -> None:
        """Forget every row."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _reserve(self, size: int) -> None:
        """Count ``size`` bytes more, after making room for them: the bound holds before the row is written.

        The count is one number in a file, under a lock that all processes share; each eviction makes it true again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _COUNTER_NAME).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            used = _COUNTER.unpack(content)[0] if len(content) == _COUNTER.size else self.limit + 1
            if used + size > self.limit:
                used = self._evict(int(self.limit * _KEEP) - size)
            file.truncate(0)
            file.write(_COUNTER.pack(used + size))

    def _evict(self, target: int) -> int:
        """Delete rows, oldest use first, until ``target`` bytes are left. Returns what is left."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        now = time.time()
        for last_use, size, path in files:
            if path.name.startswith(".") and now - last_use < _STALE_SECONDS:
                continue  # being written
            if used <= target:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for parent, _, names in os.walk(self.folder):
            for name in names:
                if name == _COUNTER_NAME:
                    continue
                path = Path(parent, name)
                try:
                    status = path.stat()
                except OSError:
                    continue
                yield status.st_mtime, status.st_size, path


def _checksum(data: Bytes) -> int:
    data = data.view()
    data.flags.writeable = False  # the C function takes no other buffer
    return int(google_crc32c.value(data))
