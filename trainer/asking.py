"""Asking the teacher service for rows that are not committed. It answers where they stand; they are read from the store.

A request is ``POST URL`` with ``{"teacher", "group", "image_id", "view"}``, and ``"look": true`` by who was told that a row is
there and does not find it; without image and view it is for the group alone, so that it exists. The answer is an `Answer` as
JSON, within half a minute, if need be that the service is still at work.
"""

import hashlib
import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError

from cache import MissingRowsError, StaleCacheError, TeacherCache, fingerprint, group_name
from trainer.recipe import Recipe

# how long a service may be silent: it may be starting, or starting again after it was killed
PATIENCE_SECONDS = 120.0
_ANSWER_SECONDS = 90.0
_PAUSE_SECONDS = 0.5
_NOTICE_SECONDS = 30.0
_PROBE_SECONDS = 5.0
# the service is on this machine or in its cluster: no proxy leads there
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass(frozen=True)
class Answer:
    """What the service says of a row.

    Attributes:
        state: ``committed``; ``pending``: ask again; ``failed``: it has no targets; ``refused``: the question was wrong.
        reason: why it failed or was refused, or what it waits for.
        computed: this question, or one that was open at the same time, had it computed.
    """

    state: Literal["committed", "pending", "failed", "refused"]
    reason: str = ""
    computed: bool = False


def service_name(recipe: Recipe) -> str:
    """Name of the service that computes a recipe's rows: other recipes on the same cluster have others."""
    digest = hashlib.blake2b(f"{recipe.cache.uri}|{recipe.work_dir}".encode(), digest_size=4).hexdigest()
    return f"mtpd-{Path(recipe.work_dir).name}-{digest}"


def service_url(recipe: Recipe) -> str:
    """Where that service listens."""
    return f"{recipe.cache.service}/{service_name(recipe)}"


def ask(url: str, question: dict[str, Any], patience: float = PATIENCE_SECONDS) -> Answer:
    """Put one question, again and again as long as nobody answers.

    Raises:
        MissingRowsError: the service was silent for too long.
    """
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    silent_since = time.monotonic()
    while True:
        try:
            with _open(request, timeout=_ANSWER_SECONDS) as reply:
                return Answer(**json.load(reply))
        except (OSError, ValueError, TypeError) as error:  # HTTPError and a connection that breaks are OSErrors
            if time.monotonic() - silent_since > patience:
                said = f"HTTP {error.code}" if isinstance(error, HTTPError) else str(error)
                raise MissingRowsError(
                    f"cache.service: the teacher service at {url} does not answer ({said}). `mtpd train RECIPE` starts one on "
                    "its own cluster; elsewhere run `mtpd serve RECIPE`, and give its address as cache.service."
                ) from error
        time.sleep(_PAUSE_SECONDS)


def counts(url: str) -> dict[str, dict[str, Any]] | None:
    """What a service did so far for each teacher; None if none answers there."""
    try:
        with _open(url, timeout=_PROBE_SECONDS) as reply:
            found = json.load(reply)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def await_group(uri: str, url: str, teacher: str, record: dict[str, Any]) -> None:
    """Have the service prepare a teacher's group, so that it can be opened. Where it can be already, nobody is asked.

    Args:
        record: the fingerprint record of the targets that are wanted.

    Raises:
        MissingRowsError: the service does not answer, or cannot.
        CorruptShardError, StorageError: see `TeacherCache.open`.
    """
    try:
        TeacherCache.open(uri, teacher, fingerprint=record)
        return
    except (MissingRowsError, StaleCacheError):
        pass
    question = {"teacher": teacher, "group": group_name(teacher, fingerprint(record))}
    while (answer := ask(url, question)).state == "pending":
        pass
    if answer.state != "committed":
        raise _no_targets(url, f"teacher {teacher!r}", answer)


class RowAsker:
    """Has rows of a cache computed. As the cache, not to be shared between threads.

    Args:
        notice: called with a line now and then while it waits.
    """

    def __init__(
        self, cache: TeacherCache, url: str, notice: Callable[[str], None], patience: float = PATIENCE_SECONDS
    ) -> None:
        self._cache, self._url, self._notice, self._patience = cache, url, notice, patience

    def wait(self, image_id: int, view: int) -> None:
        """Until the row is committed; afterwards the cache has it.

        Raises:
            MissingRowsError: the teacher has no targets for it, or the service does not answer.
            CorruptShardError, StorageError: see `TeacherCache.refresh`.
        """
        info, noticed = self._cache.info, time.monotonic()
        question = {"teacher": info.teacher, "group": info.name, "image_id": image_id, "view": view}
        what = f"the row of image {image_id}, view {view} of teacher {info.teacher!r}"
        while True:
            self._cache.refresh()  # it may have been computed for somebody else
            if (image_id, view) in self._cache:
                return
            answer = ask(self._url, question, self._patience)
            if answer.state in ("failed", "refused"):
                raise _no_targets(self._url, what, answer)
            # told so, and not found after the next refresh: it was taken out of the manifest since the service looked
            question["look"] = answer.state == "committed"
            if time.monotonic() - noticed > _NOTICE_SECONDS:
                noticed = time.monotonic()
                self._notice(f"waiting for {what}: {answer.reason or 'it is being computed'}")


def _no_targets(url: str, what: str, answer: Answer) -> MissingRowsError:
    return MissingRowsError(
        f"the teacher service at {url} has no targets for {what}: {answer.reason}. Mend or remove what is named, then run the "
        "same command again."
    )
