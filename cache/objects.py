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
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore, from_url

from cache.errors import MtpdError, RecipeError, StorageError
from cache.repeats import count_repeat
from cache.storage import Entry

# each with what the names of its variables in the environment begin with
SCHEMES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_CLIENT = {"timeout": "120s", "connect_timeout": "10s"}
_CLIENT_FROM_ENVIRONMENT = ("allow_http", "allow_invalid_certificates", "proxy_url")
_RETRY = {
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2},
}
# what the client does not repeat by itself: answers that break off in the middle
_TRIES = 6
_FIRST_PAUSE = 0.2
# the client may need minutes to give up: after so many no further try is begun
_PATIENCE_SECONDS = 240.0
# what the client calls an error like any other: refused lists, and no credentials, for which it asks the machine in vain
_REFUSED = re.compile(r"status code: 40[13]\b|\bAccessDenied\b|//169\.254\.169\.254/")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
_PART_BYTES = 32 * 2**20
_CONCURRENCY = 16
_T = TypeVar("_T")
_used_by: int | None = None


class ChangedObjectError(StorageError):
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

    def stamp(self, name: str) -> str | None:
        """The object's entity tag."""
        try:
            return str(self._try(name, lambda store: obstore.head(store, name)["e_tag"]))
        except FileNotFoundError:
            return None

    def read_end(self, name: str, length: int) -> tuple[bytes, int, str]:
        """The last ``length`` bytes (fewer if there are not so many), the size of the whole, and its entity tag."""

        def get(store: ObjectStore) -> tuple[bytes, int, str]:
            try:
                result = obstore.get(store, name, options={"range": {"suffix": length}})
            except (GenericError, NotSupportedError):
                # Azure gives no range from the end, and no store one of an empty object
                size = int(obstore.head(store, name)["size"])
                wanted = (max(0, size - length), size)
                result = obstore.get(store, name, options={"range": wanted} if size else None)
            return bytes(result.bytes()), int(result.meta["size"]), str(result.meta["e_tag"])

        return self._try(name, get)

    def read_range(self, name: str, offset: int, length: int, tag: str) -> bytes:
        """A range of the object that has this entity tag.

        Raises:
            ChangedObjectError: it was written anew since.
        """
        options: Any = {"range": (offset, offset + length), "if_match": tag}
        try:
            return self._try(
                name,
                lambda store: bytes(obstore.get(store, name, options=options).bytes()),
                answers=(FileNotFoundError, PreconditionError),
            )
        except PreconditionError:
            raise ChangedObjectError(
                f"{self.where(name)}: was written anew while it was read, again and again. Run the same command again."
            ) from None

    def map(self, function: Callable[[Any], _T], items: Iterable[Any]) -> list[_T]:
        """Apply a function that waits for the storage to many items at once."""
        return list(_threads(os.getpid()).map(function, items))

    def write(self, name: str, buffers: Iterable[bytes | memoryview], *, durable: bool = True) -> int:
        """Put an object; it appears when it is complete."""
        content = b"".join(buffers)
        # not found: of an upload in parts the last answer was lost, and its repetition refused
        self._try(name, lambda store: obstore.put(store, name, content, chunk_size=_PART_BYTES), answers=())
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
        refusals = AlreadyExistsError, PreconditionError
        try:
            self._try(name, lambda store: obstore.put(store, name, new, mode=mode), answers=refusals)
        except refusals:
            # the answer to a put that succeeded may have been lost, and its repetition refused
            try:
                return self.read(name) == new
            except FileNotFoundError:
                return False
        return True

    def free_bytes(self) -> None:
        """Not known of object storage."""

    def _try(
        self,
        name: str,
        operation: Callable[[ObjectStore], _T],
        *,
        answers: tuple[type[Exception], ...] = (FileNotFoundError,),
    ) -> _T:
        """Try until it succeeds, or fails in a way that is an answer."""
        started, pause = time.monotonic(), _FIRST_PAUSE
        for attempt in range(1, _TRIES + 1):
            try:
                return operation(_store(self.uri))
            except (BaseError, OSError) as error:
                if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(str(error)):
                    raise RecipeError(
                        f"cache.uri: {self.where(name)}: access was refused ({_brief(error)}). Give credentials that may read "
                        "and write there, in the environment or by the machine's role."
                    ) from None
                if any(sign in str(error) for sign in _NO_BUCKET):
                    raise RecipeError(
                        f"cache.uri: {self.where(name)}: there is no such bucket. Create it, or correct its name."
                    ) from None
                if isinstance(error, answers):
                    raise type(error)(f"{self.where(name)} is not there, or not as expected") from None
                if attempt == _TRIES or time.monotonic() - started > _PATIENCE_SECONDS:
                    raise StorageError(
                        f"{self.where(name)}: the storage does not answer as it should, after {attempt} tries "
                        f"({_brief(error)}). What was committed stays; check the network and the service, then run the same "
                        "command again."
                    ) from None
                count_repeat()
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause *= 2
        raise AssertionError("unreachable")


@lru_cache(maxsize=16)
def _open(uri: str, _process: int) -> ObjectStore:
    prefix = SCHEMES[uri.partition("://")[0]]
    # options that are given replace all that the environment says of the client, such as that a local server speaks http
    said = {key: os.environ.get(f"{prefix}_{key.upper()}") for key in _CLIENT_FROM_ENVIRONMENT}
    options = _CLIENT | {key: value for key, value in said.items() if value}
    store: ObjectStore = from_url(uri, client_options=options, retry_config=_RETRY)  # type: ignore[call-overload]
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
    """What an error says, without what may hold a credential: parameters, a user in an address, the answer's body."""
    text = str(error).partition("\n\nDebug source")[0]
    code = re.search(r"<Code>(\w{1,64})</Code>", text)
    text = re.split(r"[<{\n]", text, maxsplit=1)[0]
    text = re.sub(r"\?\S*", "", re.sub(r"//[^/\s]*@", "//", text)).strip(" :")[:300]
    return f"{text}: {code[1]}" if code else text
