"""Where a cache's bytes live, behind one small interface: a local directory here, object storage in `cache.objects`.

Every write is whole or absent. Nothing holds a thread or an open file between calls, so that a storage survives ``fork``
and pickling.
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cache import pagecache
from cache.errors import BudgetError, CorruptShardError, RecipeError

# of a file that must be flushed in the end, so much is handed to the disk at once
_AHEAD_BYTES = 2**23


@dataclass(frozen=True)
class Entry:
    """A stored file: its name, its bytes, and when it was last written, in seconds since the epoch."""

    name: str
    size: int
    modified: float


class Storage(Protocol):
    """What a cache asks of the place where it lives. Names are relative and use ``/``."""

    def where(self, name: str = "") -> str:
        """A name as the user knows it: path or URI."""

    def exists(self, name: str) -> bool:
        """Whether something was written under this name."""

    def read(self, name: str) -> bytes:
        """The whole content.

        Raises:
            FileNotFoundError: nothing was written under this name.
        """

    def read_end(self, name: str, length: int) -> tuple[bytes, int, str]:
        """The last ``length`` bytes (fewer if there are not so many), the size of the whole, and its stamp.

        Raises:
            FileNotFoundError: nothing was written under this name.
        """

    def stamp(self, name: str) -> str | None:
        """What changes whenever the content is replaced; None if nothing was written under this name."""

    def write(self, name: str, buffers: Iterable[bytes | memoryview], *, durable: bool = True) -> int:
        """Write, replacing what was there; the content appears whole or not at all. Returns the number of bytes.

        Args:
            durable: survive a power cut, not only a killed process.

        Raises:
            BudgetError: the disk is full.
        """

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Sorted names of the files directly inside a folder; empty if there is none."""

    def folders(self, folder: str = "") -> list[str]:
        """Sorted names, without their parents, of the folders directly inside a folder."""

    def walk(self, folder: str) -> Iterator[Entry]:
        """Every file inside a folder, at any depth."""

    def delete(self, name: str) -> None:
        """Remove a file; no error if it is not there."""

    def prune(self, folder: str) -> None:
        """Remove what is empty of a folder and its folders. Nobody may be writing there."""

    def swap(self, name: str, expected: bytes | None, new: bytes | None) -> bool:
        """Compare and swap: write ``new`` only if the content is ``expected``; None means absent.

        Returns:
            Whether the content was as expected, and is now ``new``.

        Raises:
            RecipeError: the storage cannot be written to.
        """

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where there is no limit to be known."""


@dataclass(frozen=True)
class LocalStorage:
    """A directory.

    Attributes:
        root: absolute path of the directory; it need not exist before the first write.
    """

    root: Path

    def where(self, name: str = "") -> str:
        """The path of a name."""
        return str(self.root / name)

    def path(self, name: str) -> Path:
        """The file behind a name.

        Raises:
            CorruptShardError: a symbolic link on the way leads out of the directory.
        """
        path = self.root / name
        if not f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(self.root)}/".replace("//", "/")):
            raise CorruptShardError(f"{path}: leads out of the cache; links to elsewhere are not followed. Remove it.")
        return path

    def exists(self, name: str) -> bool:
        """Whether something was written under this name."""
        return self.path(name).is_file()

    def read(self, name: str) -> bytes:
        """The whole content."""
        return self.path(name).read_bytes()

    def read_end(self, name: str, length: int) -> tuple[bytes, int, str]:
        """The last ``length`` bytes, the size of the whole, and its stamp."""
        with self.path(name).open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - length))
            return file.read(), status.st_size, _identity(status)

    def stamp(self, name: str) -> str | None:
        """The file's identity: each write makes a new one."""
        try:
            return _identity(self.path(name).stat())
        except FileNotFoundError:
            return None

    def write(self, name: str, buffers: Iterable[bytes | memoryview], *, durable: bool = True) -> int:
        """Write to a temporary file, flush it to the disk if it must be durable, rename it."""
        target = self.path(name)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb", buffering=0) as file:
                written = begun = 0
                for buffer in buffers:
                    written += _write_all(file.fileno(), buffer)
                    if durable and written - begun >= _AHEAD_BYTES:
                        pagecache.begin_writing(file.fileno(), begun, written - begun)
                        begun = written
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException as error:
            with suppress(OSError):  # a disk that became read-only refuses this too
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._explained(error, name) from error
            raise
        return written

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Sorted names of the files directly inside a folder; empty if there is none."""
        directory = self.path(folder)
        if not directory.is_dir():
            return []
        return sorted(
            f"{folder}/{entry.name}"
            for entry in os.scandir(directory)
            if entry.name.endswith(suffix) and not entry.name.startswith(".") and entry.is_file()
        )

    def folders(self, folder: str = "") -> list[str]:
        """Sorted names of the folders directly inside a folder."""
        directory = self.path(folder)
        if not directory.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))

    def walk(self, folder: str) -> Iterator[Entry]:
        """Every file inside a folder, temporary ones too; links are listed, not followed."""
        for parent, _, files in os.walk(self.path(folder)):
            for file in files:
                path = Path(parent, file)
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                yield Entry(path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime)

    def delete(self, name: str) -> None:
        """Remove a file, or a link itself."""
        (self.path(str(Path(name).parent)) / Path(name).name).unlink(missing_ok=True)

    def prune(self, folder: str) -> None:
        """Remove what is empty of a folder and its folders."""
        for parent, _, _ in os.walk(self.path(folder), topdown=False):
            with suppress(OSError):
                Path(parent).rmdir()

    def swap(self, name: str, expected: bytes | None, new: bytes | None) -> bool:
        """Compare and swap, under a lock on a file beside it."""
        with self._exclusively(name):
            current = self.read(name) if self.exists(name) else None
            if current != expected:
                return False
            if new is None:
                self.path(name).unlink(missing_ok=True)
            else:
                self.write(name, [new])
            return True

    def free_bytes(self) -> int:
        """Free bytes of the file system that holds the directory, or will hold it."""
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def _explained(self, error: OSError, name: str) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return BudgetError(
                f"{self.root}: the disk is full while writing {name}. What was committed stays; free some space and run "
                "`mtpd precompute` again."
            )
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            return self._unwritable(error)
        return error

    def _unwritable(self, error: OSError) -> RecipeError:
        return RecipeError(
            f"cache.uri: {self.root} cannot be written to ({error.strerror}). Make it writable or give another folder."
        )

    @contextmanager
    def _exclusively(self, name: str) -> Iterator[None]:
        target = self.path(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = target.with_name(f".{target.name}.lock").open("a")
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_storage(uri: str) -> Storage:
    """The storage behind a cache's URI: a path, or ``s3://``, ``gs://``, ``az://`` with a bucket and a prefix.

    Raises:
        RecipeError: a scheme that is not handled, or credentials in the URI.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStorage(Path(uri).expanduser().absolute())
    if scheme == "file":
        return LocalStorage(Path(rest).absolute())
    from cache.objects import SCHEMES, ObjectStorage  # only where it is needed: its library starts threads

    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise RecipeError(f"cache.uri: {scheme}:// is not supported; give the path of a directory, or {known}.")
    return ObjectStorage(uri.rstrip("/"))


def _write_all(file: int, buffer: bytes | memoryview) -> int:
    view = memoryview(buffer).cast("B")
    written = 0
    while written < len(view):
        written += os.write(file, view[written:])
    return written


def _identity(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
