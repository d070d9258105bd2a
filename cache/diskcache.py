"""A bounded folder on the local disk that keeps rows of a remote cache: what was used longest ago goes first.

Any number of processes share a folder. One file is one row; it is written under another name and renamed, and it ends in
its label and a checksum, so that whatever happens to the folder, a row is either right or read from the remote cache again.
"""

import fcntl
import hashlib
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from cache.shard import Bytes

_END = struct.Struct("<QI")
_COUNTER = struct.Struct("<qq")  # bytes, and their complement: zeros, which a crash may leave, are no count
_COUNTER_NAME = "bytes.count"
# rows lie in a folder of their own: what else is in the folder that the user gave is not counted, and never deleted
_OWN = "mtpd-rows"
# after an eviction so much of the bound is in use: the folder is listed once for many rows that are added
_KEEP = 0.9


@dataclass(frozen=True)
class DiskCache:
    """Rows on the local disk.

    Attributes:
        folder: created when the first row is kept. It may hold other files.
        limit: bytes that the rows may take together.
    """

    folder: Path
    limit: int

    def get(self, name: str, label: int, nbytes: int) -> Bytes | None:
        """A row's bytes (nbytes,), or None if they are not here."""
        path = self.folder / _OWN / name
        try:
            content = np.fromfile(path, np.uint8)
        except OSError:
            return None
        data = content[:nbytes]
        if content[nbytes:].tobytes() != _end(name, label, data):
            return None
        with suppress(OSError):  # gone meanwhile, or a disk that can only be read: the row is right all the same
            os.utime(path)
        return data

    def put(self, name: str, label: int, data: Bytes) -> None:
        """Keep a row. A disk that is full or refuses is no error: the row is then not kept."""
        if data.size + _END.size > self.limit:
            return
        with suppress(OSError):
            self._put(self.folder / _OWN / name, data, _end(name, label, data))

    def used_bytes(self) -> int:
        """Bytes that rows take now, counted file by file."""
        return sum(size for _, size, _ in self._files())

    def _put(self, path: Path, data: Bytes, end: bytes) -> None:
        """Make room for a row, count it, write it.

        The count is one number in a file, and who holds the lock on that file is the only one to add, rename and delete: so
        the bound holds at every moment. It may be too high (a killed writer, a row that was there before), never too low;
        each eviction makes it true again.
        """
        size = data.size + len(end)
        path.parent.mkdir(parents=True, exist_ok=True)
        count = self.folder / _OWN / _COUNTER_NAME
        count.touch()
        with count.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            content = file.read()
            used, check = _COUNTER.unpack(content) if len(content) == _COUNTER.size else (0, 0)
            if used != ~check:
                used = self.limit  # not known: counted anew
            if used + size > self.limit:
                used = self._evict(int(self.limit * _KEEP) - size)
            if used + size > self.limit:
                return
            file.seek(0)
            file.write(_COUNTER.pack(used + size, ~(used + size)))
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
            try:
                with temporary.open("xb") as row:
                    row.write(data.data)
                    row.write(end)
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def _evict(self, target: int) -> int:
        """Delete rows, oldest use first, until ``target`` bytes are left. Returns what is left."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used <= target:
                break
            with suppress(OSError):
                path.unlink()
                used -= size
        return used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was last used, its size, and where it is. What a killed writer left counts as oldest."""
        for parent, _, names in os.walk(self.folder / _OWN):
            for name in names:
                if name == _COUNTER_NAME:
                    continue
                path = Path(parent, name)
                try:
                    status = path.stat()
                except OSError:
                    continue
                yield 0.0 if name.startswith(".") else status.st_mtime, status.st_size, path


def _end(name: str, label: int, data: Bytes) -> bytes:
    """What follows a row's bytes: its label, combined with its name, for other caches hold rows of the same label."""
    place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    data = data.view()
    data.flags.writeable = False  # the C function takes no other buffer
    return _END.pack(label ^ place, int(google_crc32c.value(data)))
