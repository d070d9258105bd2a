"""A cache in object storage, through obstore: S3, Google Cloud Storage, Azure.

Credentials come from where the provider's tools look for them (environment, instance role); they are never part of a URI,
and nothing of them is written or printed here.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore, from_url

from cache.errors import MtpdError, RecipeError, StorageError
from cache.storage import Entry

SCHEMES = ("s3", "gs", "az")
_CLIENT = {"timeout": "120s", "connect_timeout": "10s"}
_RETRY = {
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2},
}
# what the client does not repeat by itself: answers that break off in the middle
_TRIES = 6
_FIRST_PAUSE = 0.2
_PART_BYTES = 32 * 2**20
_CONCURRENCY = 16
_T = TypeVar("_T")
_used_by: int | None = None


class ChangedObjectError(ValueError):
    """An object is not the one that was looked at before."""


@dataclass(frozen=True)
class ObjectStorage:
    """A bucket, or a prefix of one.

    Not usable in a process that was forked from one that used object storage before: the client's threads do not survive
    that. Start such workers by ``forkserver`` or ``spawn``.

    Attributes:
        uri: ``s3://bucket/prefix`` and the like.

    Raises:
        RecipeError: the URI holds credentials or parameters.
    """

    uri: str

    def __post_init__(self) -> None:
        rest = self.uri.partition("://")[2]
        if "@" in rest or "?" in rest or "#" in rest:
            scheme = self.uri.partition("://")[0]
            raise RecipeError(
                f"cache.uri: {scheme}://... holds credentials or parameters. Give bucket and prefix only; credentials come "
                "from the environment (such as AWS_ACCESS_KEY_ID) or the machine's role."
            )
        if not rest.strip("/"):
            raise RecipeError(f"cache.uri: {self.uri} names no bucket.")

    def where(self, name: str = "") -> str:
        """The URI of a name."""
        return f"{self.uri}/{name}" if name else self.uri

    def exists(self, name: str) -> bool:
        """Whether something was written under this name."""
        try:
            self._try(name, lambda store: obstore.head(store, name))
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """The whole content."""
        return self._try(name, lambda store: bytes(obstore.get(store, name).bytes()))

    def read_end(self, name: str, length: int) -> tuple[bytes, int, str]:
        """The last ``length`` bytes (fewer if there are not so many), the size of the whole, and its entity tag."""

        def get(store: ObjectStore) -> tuple[bytes, int, str]:
            result = obstore.get(store, name, options={"range": {"suffix": length}})
            return bytes(result.bytes()), int(result.meta["size"]), str(result.meta["e_tag"])

        return self._try(name, get)

    def read_range(self, name: str, offset: int, length: int, tag: str) -> bytes:
        """A range of the object that has this entity tag.

        Raises:
            ChangedObjectError: it was written anew since.
        """
        options: Any = {"range": (offset, offset + length), "if_match": tag}
        try:
            return self._try(name, lambda store: bytes(obstore.get(store, name, options=options).bytes()))
        except PreconditionError:
            raise ChangedObjectError(f"{self.where(name)} was written anew while it was read") from None

    def map(self, function: Callable[[Any], _T], items: Iterable[Any]) -> list[_T]:
        """Apply a function that waits for the storage to many items at once."""
        return list(_threads(os.getpid()).map(function, items))

    def write(self, name: str, buffers: Iterable[bytes | memoryview], *, durable: bool = True) -> int:
        """Put an object; it appears when it is complete."""
        content = b"".join(buffers)
        self._try(name, lambda store: obstore.put(store, name, content, chunk_size=_PART_BYTES))
        return len(content)

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Sorted names of the objects directly inside a folder."""
        listed = self._try(folder, lambda store: obstore.list_with_delimiter(store, prefix=folder))
        return sorted(str(meta["path"]) for meta in listed["objects"] if str(meta["path"]).endswith(suffix))

    def folders(self, folder: str = "") -> list[str]:
        """Sorted names of the folders directly inside a folder."""
        listed = self._try(folder, lambda store: obstore.list_with_delimiter(store, prefix=folder or None))
        return sorted(str(prefix).rstrip("/").rpartition("/")[2] for prefix in listed["common_prefixes"])

    def walk(self, folder: str) -> Iterator[Entry]:
        """Every object inside a folder, at any depth."""
        listed = self._try(folder, lambda store: [m for page in obstore.list(store, prefix=folder) for m in page])
        for meta in listed:
            yield Entry(str(meta["path"]), int(meta["size"]), meta["last_modified"].timestamp())

    def delete(self, name: str) -> None:
        """Remove an object; no error if it is not there."""
        try:
            self._try(name, lambda store: obstore.delete(store, name))
        except FileNotFoundError:
            return

    def prune(self, folder: str) -> None:
        """Nothing: object storage has no folders."""

    def swap(self, name: str, expected: bytes | None, new: bytes | None) -> bool:
        """Compare and swap by the object's entity tag."""
        tag = None
        if expected is not None:
            try:
                content, tag = self._try(name, lambda store: _with_tag(store, name))
            except FileNotFoundError:
                return False
            if content != expected:
                return False
        if new is None:
            self.delete(name)  # no store deletes on a condition; only a lease's holder comes here
            return True
        mode: Any = "create" if tag is None else {"e_tag": tag}
        try:
            self._try(name, lambda store: obstore.put(store, name, new, mode=mode))
        except (AlreadyExistsError, PreconditionError):
            # the answer to a put that succeeded may have been lost, and its repetition refused
            try:
                return self.read(name) == new
            except FileNotFoundError:
                return False
        return True

    def free_bytes(self) -> None:
        """Not known of object storage."""

    def _try(self, name: str, operation: Callable[[ObjectStore], _T]) -> _T:
        pause = _FIRST_PAUSE
        for attempt in range(1, _TRIES + 1):
            try:
                return operation(_store(self.uri))
            except (FileNotFoundError, AlreadyExistsError, PreconditionError):
                raise
            except (PermissionDeniedError, UnauthenticatedError) as error:
                raise RecipeError(
                    f"cache.uri: {self.where(name)}: access was refused ({_brief(error)}). Give credentials that may read and "
                    "write there, in the environment or by the machine's role."
                ) from None
            except (BaseError, OSError) as error:
                if attempt == _TRIES:
                    raise StorageError(
                        f"{self.where(name)}: the storage does not answer as it should, after {_TRIES} tries "
                        f"({_brief(error)}). What was committed stays; check the bucket's name and the network, then run the "
                        "same command again."
                    ) from None
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause *= 2
        raise AssertionError("unreachable")


@lru_cache(maxsize=16)
def _open(uri: str, _process: int) -> ObjectStore:
    # a bucket's name alone is not enough for http endpoints such as a local test server: the environment says so
    store: ObjectStore = from_url(uri, client_options=_CLIENT, retry_config=_RETRY)  # type: ignore[call-overload]
    return store


def _store(uri: str) -> ObjectStore:
    global _used_by  # the process's, for a fork breaks all clients at once
    process = os.getpid()
    if _used_by is not None and _used_by != process:
        raise MtpdError(
            f"{uri}: object storage was used before this process was forked, and its client does not survive that. Start the "
            "workers by `forkserver` or `spawn` (DataLoader: multiprocessing_context='forkserver')."
        )
    _used_by = process
    try:
        return _open(uri, process)
    except (BaseError, ValueError) as error:
        raise RecipeError(f"cache.uri: {uri} cannot be opened ({_brief(error)}).") from None


@lru_cache(maxsize=1)
def _threads(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="objects")


def _with_tag(store: ObjectStore, name: str) -> tuple[bytes, str | None]:
    result = obstore.get(store, name)
    return bytes(result.bytes()), result.meta["e_tag"]


def _brief(error: Exception) -> str:
    """The first line of an error, without the parameters of a request, in which a signature may be."""
    lines = str(error).strip().splitlines()
    return re.sub(r"\?\S*", "", lines[0] if lines else repr(type(error)))[:300]
