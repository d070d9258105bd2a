"""Where a cache's bytes live, behind one small interface: a local directory.

Every write is whole or absent: a temporary file is written, flushed to the disk and renamed. Nothing here holds a thread
or an open file between calls, so a `LocalStorage` survives ``fork`` and pickling.
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cache.errors import BudgetError, RecipeError


@dataclass(frozen=True)
class LocalStorage:
    """A directory. Paths are relative to it and use ``/``.

    Attributes:
        root: absolute path of the directory; it need not exist before the first write.
    """

    root: Path

    def path(self, name: str) -> Path:
        """The file behind a name."""
        return self.root / name

    def exists(self, name: str) -> bool:
        """Whether something was written under this name."""
        return self.path(name).is_file()

    def read(self, name: str) -> bytes:
        """The whole content.

        Raises:
            FileNotFoundError: nothing was written under this name.
        """
        return self.path(name).read_bytes()

    def write(self, name: str, buffers: Iterable[bytes | memoryview]) -> int:
        """Write atomically and durably, replacing what was there. Returns the number of bytes.

        Raises:
            BudgetError: the disk is full.
        """
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                written = sum(file.write(buffer) for buffer in buffers)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise BudgetError(
                    f"{self.root}: the disk is full while writing {name}. What was committed stays; free some space "
                    "and run `mtpd precompute` again."
                ) from error
            raise
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return written

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Sorted names (relative to the storage) of the files directly inside a folder; empty if there is none."""
        directory = self.path(folder)
        if not directory.is_dir():
            return []
        return sorted(
            f"{folder}/{entry.name}"
            for entry in os.scandir(directory)
            if entry.name.endswith(suffix) and not entry.name.startswith(".") and entry.is_file()
        )

    def folders(self) -> list[str]:
        """Sorted names of the top-level folders."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())

    def delete(self, name: str) -> None:
        """Remove a file; no error if it is not there."""
        self.path(name).unlink(missing_ok=True)

    def swap(self, name: str, expected: bytes | None, new: bytes | None) -> bool:
        """Compare and swap: write ``new`` only if the content is ``expected``; None means absent.

        Returns:
            Whether the content was as expected, and is now ``new``.

        Raises:
            RecipeError: the storage cannot be written to.
        """
        with self._exclusively(name):
            current = self.read(name) if self.exists(name) else None
            if current != expected:
                return False
            if new is None:
                self.delete(name)
            else:
                self.write(name, [new])
            return True

    @contextmanager
    def _exclusively(self, name: str) -> Iterator[None]:
        target = self.path(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = target.with_name(f".{target.name}.lock").open("a")
        except OSError as error:
            raise RecipeError(
                f"cache.uri: {self.root} cannot be written to ({error.strerror}). Make it writable or give another folder."
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_storage(uri: str) -> LocalStorage:
    """The storage behind a cache's URI.

    Raises:
        RecipeError: a scheme that is not handled.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStorage(Path(uri).expanduser().absolute())
    if scheme == "file":
        return LocalStorage(Path(rest).absolute())
    raise RecipeError(f"cache.uri: {uri!r}: scheme {scheme!r} is not supported; give the path of a directory.")
